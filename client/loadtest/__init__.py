"""The load-testing harness behind `tramontane bench`: how hard a server can be pushed, told truthfully.

    plan.py     what will be sent, and when        made by `load/`
    record.py   what became of each request        made by `generator/`
    result.py   what that means                    made by `judging/`, told by `report/`
    finding.py  the sentences that must not be missed

`session.py` is one command's story, `cli.py` its verbs. The packages come with the extra `bench`; nothing outside this
folder imports it.
"""
