"""What it means: latencies, quantiles, objectives, checks of the answers, findings, comparison of runs."""
