// Every chart of the page is kept with the function that makes its figure, and is drawn again when the theme changes or a
// control is used.
const drawn = new Map();

async function loadPlotly() {
  const bytes = Uint8Array.from(atob(document.getElementById("plotly").textContent), (one) => one.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

function draw(element, make) {
  drawn.set(element, make);
  return paint(element, make());
}

function paint(element, plain) {
  const figure = coloured(plain);
  const layout = { ...figure.layout, dragmode: touch.matches ? false : "zoom", uirevision: figure.layout.uirevision ?? "kept" };
  if (figure.data.some((trace) => trace.mode === "markers+text")) {
    thinOut(figure.data, layout, layout.width ?? element.clientWidth);
  }
  if (narrow.matches) {
    layout.margin = { ...layout.margin, l: 8, r: 8 };
    layout.font = { ...layout.font, size: 11 };
  }
  const options = {
    responsive: true,
    displaylogo: false,
    displayModeBar: touch.matches || figure.data.some((trace) => trace.type === "heatmap") ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    // plotly.js has a button that uploads the chart; it is removed.
    showSendToCloud: false,
    plotlyServerURL: "",
  };
  return Plotly.react(element, figure.data, layout, options);
}

// A label that covers another one is left out; hovering shows it. Files that are worth their size come first.
function thinOut(traces, { xaxis, yaxis, height }, width) {
  const place = (axis, length) => {
    const scale = axis.type === "log" ? Math.log10 : (value) => value;
    const key = axis === xaxis ? "x" : "y";
    const values = traces.filter((trace) => !trace.yaxis).flatMap((trace) => trace[key]).map(scale).filter(Number.isFinite);
    if (axis.rangemode === "tozero") values.push(0);
    const [least, most] = [Math.min(...values), Math.max(...values)];
    return (value) => ((scale(value) - least) / (most - least || 1)) * length;
  };
  const front = traces.find((trace) => trace.meta === "front")?.x ?? [];
  const [across, up] = [place(xaxis, width - 90), place(yaxis, height - 110)];
  const labels = traces.filter((trace) => trace.mode === "markers+text").flatMap((trace) => trace.text.map((name, index) => (
    { trace, index, name, x: across(trace.x[index]), y: up(trace.y[index]), first: front.includes(trace.x[index]) }
  )));
  const kept = [];
  for (const one of labels.sort((a, b) => b.first - a.first)) {
    const free = kept.every((other) => Math.abs(one.x - other.x) > 3.6 * (one.name.length + other.name.length)
      || Math.abs(one.y - other.y) > 13);
    if (free) kept.push(one);
    else one.trace.text[one.index] = "";
  }
}

function drawAll() {
  return Promise.all([...drawn].map(([element, make]) => draw(element, make)));
}

// The chart of a section with its controls: the figure, the groups of traces, and the logarithmic axes.
function chartOf(element) {
  const section = element.dataset.section;
  const choices = data.charts[section];
  const controls = document.querySelector(`[data-for="${section}"]`);
  const first = Object.keys(choices)[0];
  const hidden = choices[first].data.filter((trace) => trace.visible === false).map((trace) => trace.meta);
  const state = { choice: first, hidden: new Set(hidden), linear: new Set() };
  const make = () => {
    const { data: traces, layout } = structuredClone(choices[state.choice]);
    for (const axis of Object.keys(layout).filter((name) => state.linear.has(name.replace(/2$/, "")))) {
      layout[axis] = { ...layout[axis], type: "linear", tickvals: null, ticktext: null, range: null, rangemode: "tozero" };
    }
    // Another axis or choice gives a new view. Every other change keeps the reader's zoom.
    layout.uirevision = [state.choice, ...state.linear].join();
    // A trace that is hidden at first is shown once its box is checked.
    const shown = traces.filter((trace) => !state.hidden.has(trace.meta)).map((trace) => ({ ...trace, visible: true }));
    return { data: shown, layout };
  };
  if (controls) connect(controls, choices, state, () => draw(element, make));
  keys(element);
  return draw(element, make);
}

function connect(controls, choices, state, redraw) {
  const select = controls.querySelector("[data-choice]");
  if (select) {
    select.append(...Object.keys(choices).map((name) => new Option(name)));
    select.addEventListener("change", () => { state.choice = select.value; redraw(); });
  }
  const groups = controls.querySelector("[data-groups]");
  if (groups) {
    for (const trace of choices[state.choice].data) {
      const label = document.createElement("label");
      const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: trace.visible !== false });
      box.dataset.group = trace.meta;
      box.addEventListener("change", () => { toggle(state.hidden, trace.meta, !box.checked); redraw(); });
      label.append(box, ` ${trace.name}`);
      groups.append(label);
    }
  }
  for (const box of controls.querySelectorAll("[data-axis]")) {
    box.addEventListener("change", () => { toggle(state.linear, box.dataset.axis, !box.checked); redraw(); });
  }
}

function toggle(set, value, member) {
  if (member) set.add(value);
  else set.delete(value);
}

// Arrow keys go through the points of a chart and show what hovering shows. Escape leaves the chart.
function keys(element) {
  let at = -1;
  element.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      at = -1;
      Plotly.Fx.unhover(element);
      return;
    }
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1, Home: -Infinity, End: Infinity };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const stops = stopsOf(element);
    if (!stops.length) return;
    at = nextStop(stops, at, event.key, steps[event.key]);
    const { where, text } = stops[at];
    Plotly.Fx.hover(element, [where]);
    document.getElementById("live").textContent = text.replaceAll("<br>", "; ").replace(/<[^>]*>/g, "");
  });
  element.addEventListener("blur", () => { if (window.Plotly) Plotly.Fx.unhover(element); });
}

function stopsOf(element) {
  const stops = [];
  element.data.forEach((trace, curve) => {
    if (trace.hoverinfo === "skip" || trace.visible === "legendonly") return;
    if (trace.type === "heatmap") {
      trace.z.forEach((row, j) => row.forEach((value, i) => {
        // A cell is identified by its place on the axes.
        const where = { curveNumber: curve, xval: i, yval: j };
        if (value !== null) stops.push({ where, x: i, y: j, text: trace.hovertext[j][i] });
      }));
    } else {
      trace.x.forEach((x, point) => {
        const where = { curveNumber: curve, pointNumber: point };
        stops.push({ where, x, y: trace.y[point], text: trace.hovertext[point] });
      });
    }
  });
  if (element.data.some((trace) => trace.type === "heatmap")) return stops;
  // Points go from left to right; if rows are models, row by row from the top.
  const order = element.layout.yaxis.categoryarray;
  if (order) return stops.sort((a, b) => order.indexOf(b.y) - order.indexOf(a.y) || a.x - b.x);
  return stops.sort((a, b) => a.x - b.x || a.y - b.y);
}

function nextStop(stops, at, key, step) {
  const last = stops.length - 1;
  if (at < 0 && Number.isFinite(step)) return 0;
  const here = stops[at];
  const vertical = key === "ArrowDown" || key === "ArrowUp";
  if (vertical && "xval" in here.where) {
    // In a heat map the up and down keys stay in the column.
    const column = stops.map((stop, index) => ({ ...stop, index })).filter((stop) => stop.x === here.x);
    const place = column.findIndex((stop) => stop.index === at) + step;
    return column[Math.min(Math.max(place, 0), column.length - 1)].index;
  }
  return Math.min(Math.max(at + step, 0), last);
}
