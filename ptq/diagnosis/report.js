"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const KINDS = ["weight", "activation", "inherited", "total"];
const byId = (id) => document.getElementById(id);
const sites = new Map(data.sites.map((site) => [site.name, site]));

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "onclick") element.addEventListener("click", value);
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

function drawn(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// Beyond what float32 holds there is no error.
const db = (value) => (value === null ? "" : value >= 120 ? "exact" : value.toFixed(1));
const percent = (value) => (value === null ? "" : value.toFixed(2) + " %");
const short = (value) => (value === 0 ? "0" : Number(value.toPrecision(3)).toString());

function summary() {
  const output = data.output;
  let text = `${data.images} images. Result: ${db(output.snr_db)} dB, same first choice as float ` +
    `${percent(100 * output.agreement)}.`;
  if (output.top1 !== null) text += ` Top-1 ${percent(output.top1)}, float ${percent(output.float_top1)}.`;
  if (data.combined) {
    text += ` With all suggestions: ${db(data.combined.output_snr_db)} dB`;
    text += data.combined.top1 === null ? "." : `, top-1 ${percent(data.combined.top1)}.`;
  }
  byId("summary").textContent = text;
}

function yaml(rule) {
  return "- {" + Object.entries(rule).map(([key, value]) => `${key}: ${value}`).join(", ") + "}";
}

function suggestions() {
  const place = byId("suggestions");
  if (!data.suggestions.length) {
    place.append(make("p", {}, "No change that was tried makes the result better."));
    return;
  }
  for (const entry of data.suggestions) {
    const gain = make("span", { class: "gain" }, `+${entry.gain_db.toFixed(2)} dB`);
    const after = ` to ${db(entry.output_snr_db)} dB` + (entry.top1 === null ? "" : `, top-1 ${percent(entry.top1)}`);
    place.append(make("div", { class: "card" },
      make("h3", {}, entry.site),
      make("p", {}, entry.change + ": ", gain, after),
      make("pre", {}, yaml(entry.rule))));
  }
  place.append(make("p", { class: "note" },
    "Each gain was measured alone, on these images. Rules go to the top of a recipe for 'ptq quantize --recipe'."));
}

const COLUMNS = [
  ["layer", (l) => l.name], ["depth", (l) => l.depth], ["share", (l) => l.share],
  ...KINDS.map((kind) => [kind, (l) => l.snr_db[kind]]),
];
let order = { column: 2, descending: true };
const FEW = 20;
let opened = null;
let all = false;

function layers() {
  const table = byId("layers");
  const value = COLUMNS[order.column][1];
  const sorted = [...data.layers].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (order.column === 2 && a.fits !== b.fits) return a.fits ? 1 : -1;
    if (x === y) return a.depth - b.depth;
    if (x === null || y === null) return x === null ? 1 : -1;
    return (x < y ? -1 : 1) * (order.descending ? -1 : 1);
  });
  const head = make("tr", {}, ...COLUMNS.map(([name], index) => {
    const mark = index === order.column ? (order.descending ? " ▼" : " ▲") : "";
    const sort = index !== order.column ? "none" : order.descending ? "descending" : "ascending";
    return make("th", { "aria-sort": sort }, make("button", {
      type: "button",
      onclick: () => {
        order = { column: index, descending: index === order.column ? !order.descending : name === "share" };
        layers();
      },
    }, name + mark));
  }));
  const largest = Math.max(...data.layers.map((l) => l.share), 1e-12);
  const rows = (all ? sorted : sorted.slice(0, FEW)).flatMap((layer) => {
    const bar = make("span", { class: "bar" });
    bar.style.width = `${(60 * layer.share) / largest}px`;
    const row = make("tr", { class: "row" + (layer === opened ? " open" : ""), tabindex: "0" },
      make("td", layer.fits ? {} : { class: "warn" }, layer.name + (layer.fits ? "" : " (does not fit)")),
      make("td", {}, String(layer.depth + 1)),
      make("td", { class: "share" }, make("span", { class: "track" }, bar), `${(100 * layer.share).toFixed(1)} %`),
      ...KINDS.map((kind) => make("td", {}, db(layer.snr_db[kind]))));
    const open = () => { opened = layer === opened ? null : layer; layers(); };
    row.addEventListener("click", open);
    row.addEventListener("keydown", (event) => { if (event.key === "Enter") open(); });
    if (layer !== opened) return [row];
    return [row, make("tr", { class: "inside" }, make("td", { colspan: String(COLUMNS.length) }, inside(layer)))];
  });
  table.replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
  const rest = byId("rest");
  rest.hidden = data.layers.length <= FEW;
  rest.textContent = all ? `Show ${FEW} layers` : `Show all ${data.layers.length} layers`;
}

function inside(layer) {
  const plots = make("div", { class: "plots" });
  if (!layer.sites.length) plots.append(make("p", { class: "note" }, "It reads what other layers read, in the same format."));
  for (const name of layer.sites) {
    const site = sites.get(name);
    const used = site.range_used;
    const line = make("p", {}, `${site.kind}, ${site.bits} bits, ${site.format}, ${site.granularity}; ` +
      `own signal to noise ${db(site.own_snr_db)} dB`);
    if (used !== null) {
      line.append("; ", `values reach ${(100 * used).toFixed(0)} % of its range`);
      if (!site.fits) line.append("; ", make("span", { class: "warn" }, `${site.misfit.toFixed(0)} times the error of the best range for these images`));
    }
    const card = make("div", { class: "card" }, make("h3", {}, name), line);
    if (data.histograms[name]) card.append(histogram(data.histograms[name]));
    plots.append(card);
  }
  return plots;
}

function histogram(h) {
  const [width, height, bottom] = [360, 130, 24];
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  const x = (v) => 4 + ((v - h.low) / (h.high - h.low)) * (width - 8);
  // Counts span many decades: a few large values matter as much as the many small ones.
  const scale = (count) => Math.log1p(count);
  const top = Math.max(...h.counts.map(scale), 1);
  const step = (width - 8) / h.counts.length;
  h.counts.forEach((count, i) => {
    if (!count) return;
    const tall = Math.max(1, (scale(count) / top) * (height - bottom - 12));
    svg.append(drawn("rect", { x: 4 + i * step, y: height - bottom - tall, width: Math.max(step - 0.4, 0.5), height: tall, fill: "#9db8d2" }));
  });
  for (const level of h.levels || []) {
    if (level < h.low || level > h.high) continue;
    svg.append(drawn("line", { x1: x(level), x2: x(level), y1: 8, y2: height - bottom + 4, stroke: "#b35900", "stroke-width": 0.8 }));
  }
  for (const end of h.ends || []) {
    if (end < h.low || end > h.high) continue;
    svg.append(drawn("line", { x1: x(end), x2: x(end), y1: 2, y2: height - bottom + 6, stroke: "#a40e26", "stroke-width": 1.6 }));
  }
  svg.append(drawn("line", { x1: 4, x2: width - 4, y1: height - bottom, y2: height - bottom, stroke: "#57606a", "stroke-width": 0.6 }));
  svg.append(drawn("text", { x: 4, y: height - 8 }, short(h.low)));
  svg.append(drawn("text", { x: width - 4, y: height - 8, "text-anchor": "end" }, short(h.high)));
  svg.append(drawn("text", { x: width / 2, y: height - 8, "text-anchor": "middle" },
    h.levels ? "values (log count), levels" : "values (log count), ends of the format"));
  return svg;
}

const COLOURS = { weight: "#b35900", activation: "#0a5fb4", inherited: "#8250df", total: "#1b1f24" };

function lines(series, count, label) {
  const [width, height, left, bottom] = [1100, 320, 44, 34];
  const all = series.flatMap((s) => s.values).filter((v) => v !== null);
  const low = Math.floor(Math.min(...all, 0) / 10) * 10;
  const high = Math.ceil(Math.min(Math.max(...all, 10), 80) / 10) * 10;
  const x = (i) => left + (i / Math.max(count - 1, 1)) * (width - left - 12);
  const y = (v) => height - bottom - ((Math.min(v, high) - low) / (high - low)) * (height - bottom - 12);
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  for (let v = low; v <= high; v += 10) {
    svg.append(drawn("line", { x1: left, x2: width - 12, y1: y(v), y2: y(v), stroke: "#d8dee4" }));
    svg.append(drawn("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, String(v)));
  }
  for (const s of series) {
    let path = "";
    s.values.forEach((v, i) => { if (v !== null) path += `${path ? "L" : "M"}${x(i).toFixed(1)} ${y(v).toFixed(1)}`; });
    svg.append(drawn("path", { d: path, fill: "none", stroke: s.colour, "stroke-width": s.wide || 1.4 }));
    s.values.forEach((v, i) => {
      if (v === null) return;
      const dot = drawn("circle", { cx: x(i), cy: y(v), r: 2.4, fill: s.colour });
      dot.append(drawn("title", {}, `${s.names[i]}: ${s.name} ${db(v)} dB`));
      svg.append(dot);
    });
  }
  svg.append(drawn("text", { x: left, y: height - 8 }, label));
  return svg;
}

function depth() {
  const inOrder = [...data.layers].sort((a, b) => a.depth - b.depth);
  const names = inOrder.map((l) => l.name);
  const series = KINDS.map((kind) => ({
    name: kind, names, colour: COLOURS[kind], wide: kind === "total" ? 2.2 : 1.2, values: inOrder.map((l) => l.snr_db[kind]),
  }));
  const legend = make("p", { class: "legend" }, ...KINDS.map((kind) => {
    const key = make("i");
    key.style.background = COLOURS[kind];
    return make("span", {}, key, kind);
  }));
  byId("depth").append(legend, make("div", { class: "scroll" },
    lines(series, inOrder.length, "layers from first to last; ratio of signal to noise in decibel, above 80 drawn at the top")));
}

function heads() {
  const place = byId("heads");
  if (!data.heads.length) { place.append(make("p", {}, "No attention with probabilities in a format of their own.")); return; }
  const table = make("table", {});
  for (const attention of data.heads) {
    const row = make("tr", {}, make("td", {}, attention.module));
    const cell = make("td", {});
    attention.snr_db.forEach((value, head) => {
      const shade = Math.max(0, Math.min(1, (45 - value) / 40));
      const bar = make("u", {});
      bar.style.width = `${34 * attention.entropy[head]}px`;
      const square = make("span", { class: "head", title: `head ${head}: ${db(value)} dB, entropy ${attention.entropy[head].toFixed(2)}` }, value.toFixed(0), bar);
      square.style.background = `rgba(179, 89, 0, ${(0.08 + 0.6 * shade).toFixed(2)})`;
      cell.append(square);
    });
    row.append(cell);
    table.append(row);
  }
  table.className = "heads";
  place.append(table);
}

function channels() {
  const select = byId("norm");
  data.channels.forEach((norm, index) => select.append(make("option", { value: String(index) }, norm.module)));
  const draw = () => {
    const norm = data.channels[Number(select.value)];
    const [width, height, left] = [1100, 260, 56];
    const picture = (ranges, title) => {
      const order = ranges[0].map((_, i) => i).sort((a, b) => (ranges[1][a] - ranges[0][a]) - (ranges[1][b] - ranges[0][b]));
      const [low, high] = [Math.min(...ranges[0]), Math.max(...ranges[1])];
      const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
      const y = (v) => 16 + ((high - v) / (high - low || 1)) * (height - 40);
      const step = (width - left - 8) / order.length;
      let path = "";
      order.forEach((c, i) => {
        const x = (left + (i + 0.5) * step).toFixed(1);
        path += `M${x} ${y(ranges[0][c]).toFixed(1)}L${x} ${y(ranges[1][c]).toFixed(1)}`;
      });
      svg.append(drawn("path", { d: path, stroke: "#0a5fb4", "stroke-width": Math.max(step * 0.8, 0.6), fill: "none" }));
      for (const v of [low, 0, high]) svg.append(drawn("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, short(v)));
      svg.append(drawn("text", { x: left, y: height - 8 }, `${title}, ${order.length} channels`));
      return svg;
    };
    byId("channels").replaceChildren(picture(norm.traced, "as traced"), picture(norm.rewritten, "as quantized"));
  };
  select.addEventListener("change", draw);
  if (data.channels.length) draw();
}

function costs() {
  const megabytes = (bytes) => `${(bytes / 1e6).toFixed(2)} MB`;
  byId("costs").append(make("p", {}, `Integer program ${megabytes(data.size_bytes)}, float weights ${megabytes(data.float_size_bytes)}: ` +
    `${(data.float_size_bytes / data.size_bytes).toFixed(1)} times smaller.`));
  if (!data.timings.length) return;
  const table = make("table", {}, make("tr", {}, ...["backend", "batch", "threads", "median ms", "10 % below", "90 % below"].map((t) => make("th", {}, t))));
  for (const t of data.timings) {
    table.append(make("tr", {}, ...[t.backend, t.batch, t.threads, t.median_ms.toFixed(2), t.p10_ms.toFixed(2), t.p90_ms.toFixed(2)]
      .map((v) => make("td", {}, String(v)))));
  }
  byId("costs").append(make("div", { class: "scroll" }, table));
}

function provenance() {
  for (const [key, value] of Object.entries(data.provenance)) {
    byId("provenance").append(make("tr", {}, make("td", {}, key), make("td", {}, String(value))));
  }
  byId("recipe").textContent = data.recipe_yaml;
  byId("notes").textContent = data.notes.join("\n") || "nothing besides choosing formats";
}

opened = data.layers[0];
byId("rest").addEventListener("click", () => { all = !all; layers(); });
summary(); suggestions(); layers(); depth(); heads(); channels(); costs(); provenance();
