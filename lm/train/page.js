"use strict";
// Draws every <figure data-key> from the JSON in #data. Runs: name, color, tables; a table: x
// (step, tokens, time) and series (name to [row indices, values]). NaN and infinities are strings.
const DATA = JSON.parse(document.getElementById("data").textContent);
const NS = "http://www.w3.org/2000/svg";
const state = {x: "step", smooth: 0, log: false, clip: true, zoom: null, hidden: new Set()};
const tip = document.getElementById("tip");

function element(name, attributes, parent) {
  const node = document.createElementNS(NS, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (parent) parent.appendChild(node);
  return node;
}

function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-2)
    return value
      .toExponential(2)
      .replace("e+", "e")
      .replace(/\.?0+e/, "e");
  return String(+value.toPrecision(4));
}

const short = (value) => {
  for (const [size, unit] of [
    [1e12, "T"],
    [1e9, "G"],
    [1e6, "M"],
    [1e3, "k"]
  ])
    if (Math.abs(value) >= size) return +(value / size).toPrecision(4) + unit;
  return number(value);
};

function steps(low, high, count) {
  // round numbers: 1, 2 or 5 times a power of ten
  const raw = (high - low) / count || 1,
    size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((f) => f * size).find((s) => s >= raw * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
    ticks.push(i * step);
  return ticks;
}

function logTicks(low, high) {
  // low and high are powers
  if (high - low < 0.6) return steps(10 ** low, 10 ** high, 4).map(Math.log10);
  const ticks = [];
  for (let e = Math.floor(low); e <= Math.ceil(high); e++)
    for (const f of high - low < 3 ? [1, 2, 5] : [1]) {
      const power = e + Math.log10(f);
      if (power >= low && power <= high) ticks.push(power);
    }
  return ticks.length > 1 ? ticks : [low, high];
}

function smoothed(points) {
  // exponential average, unbiased at its start, over the row distance
  if (!state.smooth) return points;
  const keep = state.smooth / 100;
  let total = 0,
    weight = 0;
  return points.map(([x, y]) => {
    total = keep * total + (1 - keep) * y;
    weight = keep * weight + (1 - keep);
    return [x, total / weight];
  });
}

function collect(key) {
  // [{run, color, points, dots}] for the series of a figure
  const found = [];
  for (const run of DATA.runs) {
    if (state.hidden.has(run.name)) continue;
    for (const table of run.tables) {
      const series = table.series[key],
        xs = table.x[state.x];
      if (!series || !xs) continue;
      const points = [],
        broken = [];
      series[0].forEach((row, i) => {
        const x = xs[row],
          y = series[1][i];
        if (x === null) return;
        if (typeof y !== "number") broken.push(x);
        else if (!state.log || y > 0) points.push([x, y]);
      });
      if (points.length || broken.length)
        found.push({run, points, broken, sparse: key.startsWith("eval")});
    }
  }
  return found;
}

function draw(figure) {
  const keys = figure.dataset.key.split(" ");
  const lines = keys.flatMap((key, dash) => collect(key).map((line) => ({...line, key, dash})));
  figure.querySelector("svg")?.remove();
  const width = Math.max(320, figure.clientWidth - 22),
    height = figure.classList.contains("lead") ? 330 : 190;
  const style = figure.dataset.style || "";
  const left = 52,
    right = 8,
    top = 8,
    bottom = 22;
  const svg = element("svg", {viewBox: `0 0 ${width} ${height}`, role: "img"}, figure);
  element("title", {}, svg).textContent = figure.querySelector("figcaption").textContent;
  let seen = lines.flatMap((line) => line.points);
  if (!seen.length && !lines.some((line) => line.broken.length)) {
    element("text", {x: width / 2, y: height / 2, "text-anchor": "middle"}, svg).textContent =
      "no values" + (state.x === "time" ? " over time" : "");
    return;
  }
  const xs = seen.map((p) => p[0]).concat(lines.flatMap((line) => line.broken));
  let [x0, x1] = state.zoom || [least(xs), most(xs)];
  if (x1 === x0) {
    x0 -= 0.5;
    x1 += 0.5;
  }
  seen = seen.filter((p) => p[0] >= x0 && p[0] <= x1);
  const scale = state.log ? Math.log10 : (v) => v;
  let values = seen.map((p) => scale(p[1])).sort((a, b) => a - b);
  let y0 = values[0] ?? 0,
    y1 = values[values.length - 1] ?? 1;
  if (state.clip && values.length > 20) {
    // outliers do not squeeze the rest
    const low = values[Math.floor(values.length * 0.01)],
      high = values[Math.ceil(values.length * 0.99) - 1];
    const room = (high - low) * 0.5;
    y0 = Math.max(y0, low - room);
    y1 = Math.min(y1, high + room);
  }
  if (y1 - y0 < Math.abs(y1) * 1e-9 + 1e-30) {
    const pad = state.log ? 0.1 : Math.abs(y0) * 0.1 || 1;
    if (y0 || state.log) y0 -= pad;
    y1 += pad;
  } else {
    const pad = (y1 - y0) * 0.04;
    y0 = y0 >= 0 && !state.log ? Math.max(0, y0 - pad) : y0 - pad;
    y1 += pad;
  }
  const X = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
  const Y = (y) => top + ((y1 - scale(y)) / (y1 - y0)) * (height - top - bottom);
  for (const tick of state.log ? logTicks(y0, y1) : steps(y0, y1, 5)) {
    const y = top + ((y1 - tick) / (y1 - y0)) * (height - top - bottom);
    element("line", {class: "grid", x1: left, x2: width - right, y1: y, y2: y}, svg);
    element("text", {x: left - 6, y: y + 4, "text-anchor": "end"}, svg).textContent = short(
      state.log ? +(10 ** tick).toPrecision(3) : tick
    );
  }
  for (const tick of steps(x0, x1, Math.max(3, width / 110))) {
    const edge = X(tick) > width - right - 14;
    const place = {x: edge ? width - 2 : X(tick), y: height - 6};
    element("text", {...place, "text-anchor": edge ? "end" : "middle"}, svg).textContent = short(
      +tick.toPrecision(10)
    );
  }
  const id = "c" + Math.random().toString(36).slice(2);
  element(
    "rect",
    {x: left, y: top, width: width - left - right, height: height - top - bottom},
    element("clipPath", {id}, element("defs", {}, svg))
  );
  const plot = element("g", {"clip-path": `url(#${id})`}, svg);
  for (const line of lines) {
    const color = line.run.color,
      dash = line.dash && !line.sparse ? "5 3" : "none";
    const path = (points, extra) =>
      element(
        "polyline",
        {
          points: points.map(([x, y]) => `${X(x).toFixed(1)},${Y(y).toFixed(1)}`).join(" "),
          fill: "none",
          stroke: color,
          "stroke-dasharray": dash,
          "stroke-linejoin": "round",
          ...extra
        },
        plot
      );
    line.shown = line.sparse || style ? line.points : smoothed(line.points);
    if (line.shown !== line.points) path(line.points, {"stroke-width": 1, opacity: 0.28});
    if (style !== "dots") path(line.shown, {"stroke-width": 1.6});
    else
      for (const [x, y] of line.points)
        element("circle", {cx: X(x), cy: Y(y), r: 1.6, fill: color}, plot);
    if (line.sparse || line.points.length === 1)
      for (const [x, y] of line.points)
        element(
          "circle",
          {cx: X(x), cy: Y(y), r: 3.2, fill: "var(--box)", stroke: color, "stroke-width": 1.6},
          plot
        );
    for (const x of line.broken)
      element(
        "text",
        {x: X(x), y: height - bottom - 3, "text-anchor": "middle", style: `fill:${color}`},
        plot
      ).textContent = "×";
  }
  interact(figure, svg, lines, {X, Y, x0, x1, left, right, top, bottom, width, height});
}

const least = (list) => list.reduce((a, b) => Math.min(a, b), Infinity);
const most = (list) => list.reduce((a, b) => Math.max(a, b), -Infinity);

function nearest(points, x) {
  let low = 0,
    high = points.length - 1;
  while (high - low > 1) {
    const mid = (low + high) >> 1;
    if (points[mid][0] < x) low = mid;
    else high = mid;
  }
  return points.length && Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x)
    ? points[low]
    : points[high];
}

function interact(figure, svg, lines, box) {
  const cross = element(
    "line",
    {class: "cross", y1: box.top, y2: box.height - box.bottom, visibility: "hidden"},
    svg
  );
  const band = element(
    "rect",
    {
      y: box.top,
      height: box.height - box.top - box.bottom,
      fill: "var(--accent)",
      opacity: 0.15,
      visibility: "hidden"
    },
    svg
  );
  let from = null;
  const place = (event) => {
    const bounds = svg.getBoundingClientRect(),
      px = ((event.clientX - bounds.left) / bounds.width) * box.width;
    return Math.min(Math.max(px, box.left), box.width - box.right);
  };
  const value = (px) =>
    box.x0 + ((px - box.left) / (box.width - box.left - box.right)) * (box.x1 - box.x0);
  svg.onpointermove = (event) => {
    const px = place(event),
      x = value(px);
    cross.setAttribute("x1", px);
    cross.setAttribute("x2", px);
    cross.setAttribute("visibility", "visible");
    if (from !== null) {
      band.setAttribute("x", Math.min(from, px));
      band.setAttribute("width", Math.abs(px - from));
      band.setAttribute("visibility", "visible");
    }
    const many = new Set(lines.map((line) => line.key)).size > 1;
    tip.replaceChildren();
    const head = document.createElement("div");
    head.textContent = `${state.x} ${short(+x.toPrecision(5))}`;
    head.className = "soft";
    tip.append(head);
    for (const line of lines) {
      const point = nearest(line.shown, x);
      if (!point) continue;
      const row = document.createElement("div"),
        dot = document.createElement("i");
      dot.className = "swatch";
      dot.style.background = line.run.color;
      row.append(
        dot,
        `${DATA.runs.length > 1 || !many ? line.run.name : ""}${many ? ` ${line.key}` : ""} ` +
          number(point[1])
      );
      tip.append(row);
    }
    tip.style.display = "block";
    const over = event.clientX + tip.offsetWidth + 24 > innerWidth;
    tip.style.left = `${over ? event.clientX - tip.offsetWidth - 12 : event.clientX + 14}px`;
    tip.style.top = `${Math.min(event.clientY + 12, innerHeight - tip.offsetHeight - 6)}px`;
  };
  svg.onpointerleave = () => {
    tip.style.display = "none";
    cross.setAttribute("visibility", "hidden");
  };
  svg.onpointerdown = (event) => {
    from = place(event);
    svg.setPointerCapture(event.pointerId);
  };
  svg.onpointerup = (event) => {
    const to = place(event),
      start = from;
    from = null;
    band.setAttribute("visibility", "hidden");
    if (start !== null && Math.abs(to - start) > 6) {
      state.zoom = [value(Math.min(start, to)), value(Math.max(start, to))];
      redraw();
    }
  };
  svg.ondblclick = () => {
    state.zoom = null;
    redraw();
  };
}

function redraw() {
  for (const figure of document.querySelectorAll("figure[data-key]"))
    if (!figure.closest("details:not([open])")) draw(figure);
}

for (const [id, read] of [
  ["x", (n) => n.value],
  ["smooth", (n) => +n.value],
  ["log", (n) => n.checked],
  ["clip", (n) => n.checked]
]) {
  const node = document.getElementById(id);
  state[id] = read(node);
  node.oninput = () => {
    state[id] = read(node);
    if (id === "x") state.zoom = null;
    redraw();
  };
}
for (const button of document.querySelectorAll("button[data-run]"))
  button.onclick = () => {
    const name = button.dataset.run,
      off = !state.hidden.delete(name);
    if (off) state.hidden.add(name);
    button.classList.toggle("off", off);
    redraw();
  };
for (const details of document.querySelectorAll("details")) details.ontoggle = redraw;
let timer;
addEventListener("resize", () => {
  clearTimeout(timer);
  timer = setTimeout(redraw, 150);
});
redraw();
