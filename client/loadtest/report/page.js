"use strict";
// Draws the figures when they come into view, in the reader's theme; on paper always in the light one.
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)").matches;
const looks = {
  light: { text: "#1c2126", grid: "#dfe3e7", line: "#9aa3ab", ground: "#ffffff" },
  dark: { text: "#e3e6e9", grid: "#333a41", line: "#6b747c", ground: "#1a1e22" },
};
let printing = false;

function draw(box) {
  const look = dark.matches && !printing ? looks.dark : looks.light;
  const figure = figures[box.dataset.figure];
  const layout = structuredClone(figure.layout);
  Object.assign(layout, { paper_bgcolor: "transparent", plot_bgcolor: "transparent", autosize: true });
  layout.font = { color: look.text, family: "system-ui, sans-serif", size: 12 };
  layout.hoverlabel = { bgcolor: look.ground, bordercolor: look.line, font: { color: look.text } };
  if (touch) layout.dragmode = false; // a finger on a plot scrolls the page
  for (const name of Object.keys(layout).filter((key) => /^[xy]axis/.test(key))) {
    Object.assign(layout[name], { gridcolor: look.grid, linecolor: look.line, tickcolor: look.line });
  }
  Plotly.react(box, figure.data, layout, { responsive: true, displayModeBar: false });
  box.dataset.drawn = "";
}

const boxes = [...document.querySelectorAll("[data-figure]")];
const drawn = () => boxes.filter((box) => "drawn" in box.dataset);
const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries.filter((each) => each.isIntersecting)) {
      watcher.unobserve(entry.target);
      if (!("drawn" in entry.target.dataset)) draw(entry.target);
    }
  },
  { rootMargin: "600px" },
);
boxes.forEach((box) => watcher.observe(box));
dark.addEventListener("change", () => drawn().forEach(draw));
addEventListener("beforeprint", () => {
  printing = true;
  boxes.filter((box) => box.offsetParent !== null).forEach(draw);
});
addEventListener("afterprint", () => {
  printing = false;
  drawn().forEach(draw);
});
