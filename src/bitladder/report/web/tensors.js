// The tensors of the chosen file: three heat maps, and a table that can be searched and sorted.
const { tensors, files, priced_by: pricedBy, presets, opened, bpw, priced, statistics } = data.tensors;
const OWN = "each tensor's own type";
const chosen = { file: null, price: OWN, statistic: null };

const typeOf = (index) => files[chosen.file]?.[index] || "";
const bytesOf = (tensor, type) => (tensor.elements && type in bpw ? (tensor.elements * bpw[type]) / 8 : null);
// A file has the prices of the model that it is made of, for its rung.
const priceOf = (tensor, type) => tensor.prices?.[pricedBy[chosen.file]]?.[type] ?? null;

// The heat maps have matrices only: kinds that are F32 in every file are left out.
const shown = tensors
  .map((tensor, index) => ({ ...tensor, index }))
  .filter(({ index }) => Object.values(files).some((types) => types[index] && types[index] !== "f32"));
const kinds = [...new Set(shown.map((tensor) => tensor.kind))];
const layers = [...new Set(shown.map((tensor) => tensor.layer))].sort((a, b) => (a ?? -1) - (b ?? -1));

function pickers() {
  const settings = {
    file: Object.keys(files),
    price: [OWN, ...priced],
    statistic: statistics.map((one) => one.title),
  };
  for (const [name, values] of Object.entries(settings)) {
    const select = document.getElementById(name);
    if (!select) continue;
    select.append(...values.map((value) => new Option(value)));
    select.selectedIndex = name === "file" ? Math.max(0, values.indexOf(opened)) : 0;
    chosen[name] = select.value;
    select.addEventListener("change", () => {
      chosen[name] = select.value;
      drawTensors();
    });
  }
}

// Colours of a heat map from its least value to its largest, in even steps: Cividis, which all readers can tell apart.
const SCALE = ["#00204c", "#3f4c6b", "#7c7b78", "#bdae6e", "#ffe945"];

// Black or white, whichever stands out more from the colour at a share of the scale: at least 4.5 : 1.
function inkOn(share) {
  const place = Math.min(Math.max(share, 0), 1) * (SCALE.length - 1);
  const below = Math.min(Math.floor(place), SCALE.length - 2);
  const part = (colour, from) => parseInt(colour.slice(from, from + 2), 16) / 255;
  const light = [[1, 0.2126], [3, 0.7152], [5, 0.0722]].reduce((sum, [from, weight]) => {
    const value = part(SCALE[below], from) + (place - below) * (part(SCALE[below + 1], from) - part(SCALE[below], from));
    return sum + weight * (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  }, 0);
  return light > 0.179 ? "#000000" : "#ffffff";
}

// The texts of the cells of a heat map, as a trace of its own, because each has its own colour.
function cellTexts(map, texts) {
  const values = map.z.flat().filter((value) => value !== null);
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const cells = map.y.flatMap((y, j) => map.x.map((x, i) => ({ x, y, value: map.z[j][i], text: texts[j][i] })));
  const shown = cells.filter(({ value }) => value !== null);
  return {
    type: "scatter",
    mode: "text",
    x: shown.map(({ x }) => x),
    y: shown.map(({ y }) => y),
    text: shown.map(({ text }) => text ?? ""),
    textfont: {
      size: narrow.matches ? 8 : 9,
      color: shown.map(({ value }) => inkOn(most > least ? (value - least) / (most - least) : 0.5)),
    },
    hoverinfo: "skip",
  };
}

function heat(cells, { logarithmic = false, text = false, title }) {
  const place = (make) => layers.map((layer) => kinds.map((kind) => {
    const tensor = shown.find((one) => one.layer === layer && one.kind === kind);
    return tensor ? make(tensor) : null;
  }));
  const values = place((tensor) => cells(tensor).value);
  const z = logarithmic ? values.map((row) => row.map((v) => (v > 0 ? Math.log10(v) : null))) : values;
  const label = (tensor) => `<b>${tensor.name}</b><br>${cells(tensor).told}`;
  const bar = { title: { text: title, side: "right" }, thickness: 12, outlinewidth: 0, len: 1 };
  if (logarithmic) Object.assign(bar, powers(z.flat().filter((one) => one !== null)));
  const map = {
    type: "heatmap",
    z,
    x: kinds,
    y: layers.map((layer) => layer ?? "–"),
    colorscale: SCALE.map((colour, step) => [step / (SCALE.length - 1), colour]),
    xgap: 1,
    ygap: 1,
    hovertext: place(label),
    hoverinfo: "text",
    hoverongaps: false,
    colorbar: bar,
  };
  return {
    data: text ? [map, cellTexts(map, place((tensor) => cells(tensor).text))] : [map],
    layout: {
      height: 110 + 18 * Math.max(layers.length, 4),
      margin: { l: 36, r: 8, t: 8, b: 80 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: "@text", size: 12, family: "system-ui, sans-serif" },
      hoverlabel: { align: "left", bgcolor: "@paper", bordercolor: "@text", font: { color: "@text" } },
      showlegend: false,
      xaxis: { type: "category", range: [-0.5, kinds.length - 0.5], tickangle: -45, showgrid: false, automargin: true },
      yaxis: {
        type: "category", range: [layers.length - 0.5, -0.5], showgrid: false, automargin: true, title: { text: "layer" },
      },
      uirevision: chosen.file,
    },
  };
}

// Ticks of a logarithmic colour bar, with the plain numbers as labels.
function powers(logs) {
  const least = Math.min(...logs);
  const most = Math.max(...logs);
  const step = Math.max(1, Math.ceil((most - least) / 6));
  const tickvals = [];
  if (most - least < 1.5) {
    for (let i = 0; i <= 3; i++) tickvals.push(least + ((most - least) * i) / 3);
  } else {
    for (let power = Math.ceil(least); power <= most; power += step) tickvals.push(power);
  }
  return { tickvals, ticktext: tickvals.map((one) => digits(10 ** one, most - least < 1.5 ? 2 : 1)) };
}

// A plain decimal, however small, so that a column has one form.
function digits(value, count = 3) {
  if (value === null || value === undefined) return "–";
  const rounded = Number(value.toPrecision(count));
  if (rounded === 0 || Math.abs(rounded) >= 1e-6) return rounded.toString();
  return rounded.toFixed(Math.min(20, count - 1 - Math.floor(Math.log10(Math.abs(rounded)))));
}

const statisticOf = (tensor, one) => {
  const value = tensor.statistics?.[one.key];
  return value === null || value === undefined ? null : one.percent ? 100 * value : value;
};

function drawTensors() {
  document.getElementById("tensors-of").textContent = chosen.file;
  const told = (tensor) => {
    const type = typeOf(tensor.index);
    const price = priceOf(tensor, type);
    return `${type || "absent"}${type in bpw ? `, ${bpw[type]} bits per weight` : ""}${price === null ? "" : `<br>adds ${digits(price)} nats`}`;
  };
  const element = (name) => document.getElementById(`heat-${name}`);
  draw(element("types"), () => heat(
    (tensor) => ({ value: bpw[typeOf(tensor.index)] ?? null, text: typeOf(tensor.index), told: told(tensor) }),
    { text: true, title: "bits per weight" },
  ));
  if (element("prices")) {
    draw(element("prices"), () => heat((tensor) => {
      const type = chosen.price === OWN ? typeOf(tensor.index) : chosen.price;
      const value = priceOf(tensor, type);
      return { value, told: `as ${type}: ${digits(value)} nats` };
    }, { logarithmic: true, title: "nats" }));
  }
  if (element("statistics")) {
    const one = statistics.find((candidate) => candidate.title === chosen.statistic);
    document.getElementById("statistic-name").textContent = one.title + (one.percent ? ", %" : "");
    draw(element("statistics"), () => heat((tensor) => {
      const value = statisticOf(tensor, one);
      return { value, told: `${one.title} ${digits(value, 4)}${one.percent ? " %" : ""}` };
    }, { logarithmic: one.key === "sum", title: one.title + (one.percent ? ", %" : "") }));
  }
  fillTable();
}

function columns() {
  const preset = files[presets[chosen.file]];
  const whole = tensors.reduce((sum, tensor, index) => sum + Math.max(0, priceOf(tensor, typeOf(index)) ?? 0), 0);
  const any = (test) => tensors.some(test);
  return [
    { head: "Tensor", cell: (t) => [t.name] },
    { head: "Type", cell: (t, i) => [typeOf(i) || "–"] },
    preset && { head: "Preset's type", cell: (t, i) => {
      const was = preset[i];
      const up = (bpw[typeOf(i)] ?? 0) - (bpw[was] ?? 0);
      const way = up > 0 ? "↑ from " : up < 0 ? "↓ from " : "= ";
      return [was && was !== typeOf(i) ? way + was : was || "–", was ? up : null];
    } },
    { head: "Bits/weight", figure: true, cell: (t, i) => [digits(bpw[typeOf(i)] ?? null, 4), bpw[typeOf(i)] ?? null] },
    any((t) => t.shape) && { head: "Shape", figure: true, cell: (t) => [t.shape ?? "–", t.elements ?? null] },
    any((t) => t.elements) && { head: "MB", figure: true, cell: (t, i) => {
      const bytes = bytesOf(t, typeOf(i));
      return [bytes === null ? "–" : digits(bytes / 1e6), bytes];
    } },
    priced.length && { head: "Adds, nats", figure: true, cell: (t, i) => [digits(priceOf(t, typeOf(i))), priceOf(t, typeOf(i))] },
    priced.length && whole > 0 && { head: "Share, %", figure: true, cell: (t, i) => {
      const price = priceOf(t, typeOf(i));
      return [price === null ? "–" : digits((100 * price) / whole, 2), price];
    } },
    ...statistics.map((one) => ({
      head: one.title + (one.percent ? ", %" : ""),
      figure: true,
      cell: (t) => [digits(statisticOf(t, one), 4), statisticOf(t, one)],
    })),
  ].filter(Boolean);
}

function fillTable() {
  const table = document.getElementById("tensor-table");
  const made = columns();
  const sorted = [...(table.tHead.rows[0]?.cells ?? [])].find((head) => head.hasAttribute("aria-sort"));
  const line = document.createElement("tr");
  line.append(...made.map(({ head, figure }) => {
    const cell = document.createElement("th");
    cell.scope = "col";
    if (figure) cell.className = "figure";
    if (sorted?.textContent === head) cell.setAttribute("aria-sort", sorted.getAttribute("aria-sort"));
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: head });
    cell.append(button);
    return cell;
  }));
  table.tHead.replaceChildren(line);
  table.tBodies[0].replaceChildren(...tensors.map((tensor, index) => {
    const row = document.createElement("tr");
    row.append(...made.map(({ figure, cell }, column) => {
      const [text, value] = cell(tensor, index);
      const made = document.createElement(column ? "td" : "th");
      if (!column) made.scope = "row";
      if (figure) made.className = "figure";
      if (value !== null && value !== undefined) made.dataset.value = value;
      made.textContent = text;
      return made;
    }));
    return row;
  }));
  sortRows(table);
  search();
}

// All words must occur in the row: "ffn_down q6_k".
function search() {
  const words = document.getElementById("search").value.toLowerCase().split(/[\s,]+/).filter(Boolean);
  const rows = [...document.getElementById("tensor-table").tBodies[0].rows];
  let count = 0;
  for (const row of rows) {
    const text = [...row.cells].slice(0, 2).map((cell) => cell.textContent.toLowerCase()).join(" ");
    row.hidden = !words.every((word) => text.includes(word));
    count += !row.hidden;
  }
  document.getElementById("found").textContent = `${count} of ${rows.length}`;
}
