"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const NS = "http://www.w3.org/2000/svg";
  const state = { axis: "samples", hidden: new Set() };
  const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 2 });
  const whole = new Intl.NumberFormat("en");

  const svg = (name, attributes, parent) => {
    const node = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (parent) parent.appendChild(node);
    return node;
  };
  const element = (name, className, content, parent) => {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (content !== null) node.textContent = content;
    parent.appendChild(node);
    return node;
  };

  // ------------------------------------------------------------------------------------------------ numbers to words

  // `step`: the distance of two ticks, whose labels must differ; without it, four digits
  const decimals = (step) => [0, 1, 2, 3, 4, 5].find((d) => Math.abs(step * 10 ** d - Math.round(step * 10 ** d)) < 1e-6) ?? 6;
  const showY = (y, format, step = null) => {
    if (format === "percent") return `${step ? (100 * y).toFixed(decimals(100 * step)) : Number((100 * y).toPrecision(3))} %`;
    if (format === "power") return y === 0 ? "0" : y.toExponential(step ? 1 : 2).replace(/\.?0+e/, "e");
    if (step ? step >= 1e4 : Math.abs(y) >= 1e6) return compact.format(y);
    const digits = step ? decimals(step) : Math.max(0, 3 - Math.floor(Math.log10(Math.abs(y) || 1)));
    const options = { minimumFractionDigits: step ? digits : 0, maximumFractionDigits: Math.min(digits, 10) };
    return y.toLocaleString("en", options);
  };
  // how many of a unit an hour or 10¹⁵ operations are: small units first
  const UNITS = {
    samples: [[1, ""]],
    hours: [[3600, " s"], [60, " min"], [1, " h"]],
    compute: [[1e6, " GFLOP"], [1e3, " TFLOP"], [1, " PFLOP"], [1e-3, " EFLOP"]],
  };
  const unitOf = (x) => UNITS[state.axis].findLast(([times]) => x * times >= 1.5) ?? UNITS[state.axis][0];
  const showX = (x, exact, [times, name] = unitOf(x)) => {
    if (state.axis === "samples") return exact ? `${whole.format(x)} samples` : compact.format(x);
    return `${Number((x * times).toPrecision(exact ? 4 : 3))}${name}`;
  };
  const ticks = (low, high, wanted) => {
    const rough = (high - low) / wanted || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 2.5, 5, 10].find((m) => m * power >= rough * 0.999);
    const out = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) out.push(k * step + 0);
    return out;
  };

  // ---------------------------------------------------------------------------------------------------------- charts

  const shown = (chart) =>
    chart.series
      .filter((s) => !state.hidden.has(s.run))
      .map((s) => ({ ...s, points: s[state.axis].map((x, i) => [x, s.y[i]]).filter(([x]) => x !== null) }));

  function range(chart, series) {
    const finite = series.flatMap((s) => s.points).filter(([, y]) => y !== null);
    const xs = finite.map(([x]) => x);
    const ys = finite.map(([, y]) => y);
    const least = (v) => v.reduce((a, b) => Math.min(a, b), Infinity);
    const most = (v) => v.reduce((a, b) => Math.max(a, b), -Infinity);
    let [low, high] = [chart.from_zero ? Math.min(0, least(ys)) : least(ys), most(ys)];
    const around = Math.abs(high) / 10 || 0.5;
    if (high === low) [low, high] = chart.from_zero && high > 0 ? [0, high * 1.2] : [low - around, high + around];
    const room = (high - low) * 0.06;
    return { x: [0, most(xs) || 1], y: [chart.from_zero && low === 0 ? 0 : low - room, high + room] };
  }

  function draw(figure) {
    const chart = data.charts[figure.dataset.chart];
    const root = figure.querySelector("svg");
    root.replaceChildren();
    const series = shown(chart);
    const [width, height] = [root.clientWidth, root.clientHeight];
    root.setAttribute("viewBox", `0 0 ${width} ${height}`);
    if (!series.some((s) => s.points.some(([, y]) => y !== null))) {
      svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, root).textContent = "nothing to show";
      return;
    }
    const limits = range(chart, series);
    const yTicks = ticks(...limits.y, 5);
    const yLabels = yTicks.map((y) => showY(y, chart.format, yTicks[1] - yTicks[0]));
    const left = 12 + 7 * Math.max(...yLabels.map((label) => label.length));
    const box = { left, right: width - 14, top: 12, bottom: height - 26 };
    const X = (x) => box.left + ((x - limits.x[0]) / (limits.x[1] - limits.x[0])) * (box.right - box.left);
    const Y = (y) => box.bottom - ((y - limits.y[0]) / (limits.y[1] - limits.y[0])) * (box.bottom - box.top);

    for (const [i, y] of yTicks.entries()) {
      svg("line", { class: "rule", x1: box.left, x2: box.right, y1: Y(y), y2: Y(y) }, root);
      svg("text", { x: box.left - 7, y: Y(y) + 4, "text-anchor": "end" }, root).textContent = yLabels[i];
    }
    const unit = unitOf(limits.x[1]);
    for (const x of ticks(...limits.x.map((x) => x * unit[0]), width < 420 ? 4 : 6).map((x) => x / unit[0])) {
      const anchor = X(x) > box.right - 14 ? "end" : "middle";
      const at = { x: anchor === "end" ? box.right + 4 : X(x), y: height - 7, "text-anchor": anchor };
      svg("text", at, root).textContent = showX(x, false, unit);
    }
    const marks = chart.marks.filter((m) => {
      const x = m[state.axis]; // null where a run's compute is not known
      return !state.hidden.has(m.run) && x !== null && x <= limits.x[1];
    });
    for (const mark of marks) {
      const g = svg("g", { class: `r${mark.run % 8}` }, root);
      const x = X(mark[state.axis]);
      svg("line", { class: "restart", x1: x, x2: x, y1: box.top, y2: box.bottom }, g);
      svg("path", { class: "flag", d: `M${x - 4},${box.top - 6}h8l-4,6z` }, g);
      svg("title", {}, g).textContent = mark.text;
    }
    for (const s of series) {
      const g = svg("g", { class: `r${s.run % 8}` }, root);
      let pen = "M";
      let path = "";
      for (const [x, y] of s.points) {
        if (y === null) { pen = "M"; continue; }
        path += `${pen}${X(x).toFixed(1)},${Y(y).toFixed(1)}`;
        pen = "L";
      }
      const kind = { line: "curve", faint: "curve faint", points: "curve joined" }[s.style];
      svg("path", { class: kind, d: path }, g);
      const finite = s.points.filter(([, y]) => y !== null);
      if (s.style === "points" || finite.length === 1) {
        for (const [x, y] of finite) svg("circle", { class: "dot", cx: X(x), cy: Y(y), r: 4 }, g);
      }
      if (s.setting && finite.length) {
        const [x, y] = finite.at(-1);
        const anchor = X(x) > (box.left + box.right) / 2 ? "end" : "start";
        svg("text", { class: "setting", x: X(x), y: Y(y) - 9, "text-anchor": anchor }, g).textContent = s.setting;
      }
    }
    const cross = svg("line", { class: "cross", y1: box.top, y2: box.bottom, visibility: "hidden" }, root);
    root.onpointermove = (event) => point(figure, chart, series, marks, event, { box, X, limits, cross });
    root.onpointerleave = () => {
      cross.setAttribute("visibility", "hidden");
      figure.querySelector(".tip")?.remove();
    };
  }

  function point(figure, chart, series, marks, event, { box, X, limits, cross }) {
    const at = event.clientX - figure.querySelector("svg").getBoundingClientRect().left;
    const wanted = limits.x[0] + ((at - box.left) / (box.right - box.left)) * (limits.x[1] - limits.x[0]);
    const rows = [];
    let x = null;
    for (const s of series.filter((s) => s.style !== "faint")) {
      const finite = s.points.filter(([, y]) => y !== null);
      if (!finite.length) continue;
      const best = finite.reduce((a, b) => (Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a));
      if (x === null || Math.abs(best[0] - wanted) < Math.abs(x - wanted)) x = best[0];
      rows.push([s, best]);
    }
    if (x === null) return;
    cross.setAttribute("visibility", "visible");
    cross.setAttribute("x1", X(x));
    cross.setAttribute("x2", X(x));
    figure.querySelector(".tip")?.remove();
    const tip = element("div", "tip", null, figure);
    element("span", "soft", showX(x, true), tip);
    for (const [s, [sx, sy]] of rows) {
      const row = element("div", `r${s.run % 8}`, null, tip);
      element("span", "swatch", "", row);
      const where = sx === x ? "" : ` (at ${showX(sx, true)})`;
      element("span", "", `${rows.length > 1 ? `${s.label} ` : ""}${showY(sy, chart.format)}${where}`, row);
    }
    for (const mark of marks) {
      if (Math.abs(X(mark[state.axis]) - at) < 8) element("div", "soft", `restart: ${mark.text}`, tip);
    }
    if (at > (box.left + box.right) / 2) tip.style.left = `${box.left + 16}px`;
    else tip.style.right = "22px";
  }

  const figures = [...document.querySelectorAll(".chart")];
  const drawAll = () => figures.forEach(draw);
  const resized = new ResizeObserver((entries) => entries.forEach((e) => draw(e.target.closest(".chart"))));
  figures.forEach((figure) => resized.observe(figure.querySelector("svg")));

  for (const button of document.querySelectorAll("[data-axis]")) {
    button.addEventListener("click", () => {
      state.axis = button.dataset.axis;
      for (const b of document.querySelectorAll("[data-axis]")) b.setAttribute("aria-pressed", String(b === button));
      drawAll();
    });
  }
  for (const button of document.querySelectorAll(".legend [data-run]")) {
    button.addEventListener("click", () => {
      const run = Number(button.dataset.run);
      if (!state.hidden.delete(run)) state.hidden.add(run);
      button.setAttribute("aria-pressed", String(!state.hidden.has(run)));
      drawAll();
    });
  }

  // ---------------------------------------------------------------------------------------------------- sample grids

  for (const slider of document.querySelectorAll("input[data-grids]")) {
    const frames = data.grids[slider.dataset.grids];
    const figure = slider.closest("section");
    slider.addEventListener("input", () => {
      const frame = frames[slider.valueAsNumber];
      const image = figure.querySelector("img.generated");
      image.src = frame.source;
      image.alt = `generated images at ${whole.format(frame.samples)} samples seen`;
      figure.querySelector("output").textContent = whole.format(frame.samples);
    });
  }
})();
