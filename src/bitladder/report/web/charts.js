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
    placeLabels(figure.data, layout, layout.width ?? element.clientWidth);
  }
  if (narrow.matches) {
    layout.margin = { ...layout.margin, l: 8, r: 8 };
    layout.font = { ...layout.font, size: 11 };
  }
  const options = {
    responsive: true,
    displaylogo: false,
    displayModeBar: touch.matches || narrow.matches || figure.data.some((trace) => trace.type === "heatmap") ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    // plotly.js has a button that uploads the chart; it is removed.
    showSendToCloud: false,
    plotlyServerURL: "",
  };
  return Plotly.react(element, figure.data, layout, options);
}

// Places of a label beside its mark, in the order in which they are tried: steps to the right and up.
const PLACES = {
  "top center": [0, 1], "bottom center": [0, -1], "middle right": [1, 0], "middle left": [-1, 0],
  "bottom left": [-1, -1], "top right": [1, 1], "bottom right": [1, -1], "top left": [-1, 1],
};

// Pixels of an axis by value, from its lower end. Plotly.js leaves some room beyond the outermost marks.
function ruler(axis, values, length) {
  const scale = axis.type === "log" ? Math.log10 : (value) => value;
  const scaled = values.map(scale).filter(Number.isFinite);
  if (axis.rangemode === "tozero") scaled.push(0);
  const [least, most] = axis.range ?? [Math.min(...scaled), Math.max(...scaled)];
  const room = axis.range ? 0 : 0.06 * (most - least);
  return (value) => ((scale(value) - least + room) / (most - least + 2 * room || 1)) * length;
}

// A label stands where it covers no mark, no error bar and no other label. If there is no such place it is left out, and
// hovering shows it. Files that are worth their size come first.
function placeLabels(traces, { xaxis, yaxis, height }, width) {
  const drawn = traces.filter((trace) => !trace.yaxis);
  const marked = drawn.filter((trace) => trace.mode?.includes("markers"));
  const wide = width - 90;
  const across = ruler(xaxis, drawn.flatMap((trace) => trace.x), wide);
  const up = ruler(yaxis, drawn.flatMap((trace) => trace.y), height - 110);
  const taken = marked.flatMap((trace) => trace.x.flatMap((value, index) => {
    const [x, y, error] = [across(value), trace.y[index], trace.error_y?.array[index] ?? 0];
    const [low, high] = [up(y - error), up(y + error)];
    return [
      { x, y: up(y), w: 6, h: 6 },
      ...(Number.isFinite(low + high) ? [{ x, y: (low + high) / 2, w: 2, h: (high - low) / 2 }] : []),
    ];
  }));
  const front = traces.find((trace) => trace.meta === "front")?.x ?? [];
  const labels = marked.filter((trace) => trace.mode === "markers+text").flatMap((trace) => {
    const usual = trace.textposition;
    trace.textposition = trace.text.map(() => usual);
    return trace.text.map((name, index) => ({ trace, index, name, usual, first: front.includes(trace.x[index]) }));
  });
  for (const { trace, index, name, usual } of labels.sort((a, b) => b.first - a.first)) {
    const [w, h] = [3.4 * name.length, 7];
    const box = (place) => {
      const [right, above] = PLACES[place];
      return { x: across(trace.x[index]) + right * (w + 8), y: up(trace.y[index]) + above * 14, w, h };
    };
    const free = (place) => {
      const one = box(place);
      return one.x - w > -4 && one.x + w < wide + 16 && taken.every((other) => (
        Math.abs(one.x - other.x) > w + other.w || Math.abs(one.y - other.y) > h + other.h
      ));
    };
    const place = [usual, ...Object.keys(PLACES)].find(free);
    if (place) {
      trace.textposition[index] = place;
      taken.push(box(place));
    } else {
      trace.text[index] = "";
    }
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
