// Draws every figure in the colours of the reader's screen, and the gates at the moment the slider shows.
const { charts, frames, themes } = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const views = {};

async function draw() {
  const config = themes[dark.matches ? 1 : 0];
  await Promise.all(Object.entries(charts).map(async ([name, spec]) => {
    views[name]?.finalize();
    const options = { actions: false, renderer: "svg", config, tooltip: { theme: dark.matches ? "dark" : "light" } };
    views[name] = (await vegaEmbed(document.getElementById(name), spec, options)).view;
  }));
  if (frames.length) await show(Number(slider.value));
  document.body.dataset.drawn = "yes";
}

const slider = document.getElementById("moment");

function cells(name, values) {
  if (name === "layers") return values.map((open, layer) => ({ layer, unit: 0, open }));
  const rows = name === "hidden" ? [values] : values;
  return rows.flatMap((row, layer) => row.map((open, unit) => ({ layer, unit, open })));
}

async function show(moment) {
  const frame = frames[moment];
  document.getElementById("when").value =
    `step ${frame.step.toLocaleString("en")}, ${frame.tokens.toLocaleString("en")} tokens`;
  await Promise.all(Object.keys(frame).filter((name) => views[`gates-${name}`])
    .map((name) => views[`gates-${name}`].data("cells", cells(name, frame[name])).resize().runAsync()));
}

if (slider) {
  const button = document.getElementById("play");
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "play"; };
  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (Number(slider.value) === frames.length - 1) slider.value = -1;
    button.textContent = "pause";
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show(Number(slider.value));
      if (Number(slider.value) === frames.length - 1) stop();
    }, 150);
  });
}

dark.addEventListener("change", draw);
draw();
