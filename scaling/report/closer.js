"use strict";
// A chart of the runs, drawn by uPlot: which one a point is, by which count of N and which rule of C, beside which law.
function closerChart(page) {
  const section = document.getElementById("closer"), runs = page.runs;
  if (!section || !runs || !runs.id.length || typeof uPlot === "undefined") return;
  const COLOURS = ["#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#8bbd1c"];
  const SHAPES = ["disc", "square", "triangle", "diamond"], MOST_GROUPS = COLOURS.length, GRID = 80, NEAR = 40;
  const RUN = 0, X = 1, Y = 2, GROUP = 3;
  const chosen = name => section.querySelector(`select[name=${name}]`).value;
  const box = section.querySelector(".chart"), card = section.querySelector(".card"), keys = section.querySelector(".keys");
  const note = section.querySelector(".note"), ring = make("div", "", { class: "ring", hidden: "" });
  let chart, points = [], hidden = new Set(), at = -1;

  for (const [name, options] of [["count", Object.keys(runs.counts)], ["rule", Object.keys(runs.flops)]]) {
    for (const option of options)
      section.querySelector(`select[name=${name}]`).append(make("option", option.replaceAll("_", "-"), { value: option }));
    section.querySelector(`select[name=${name}]`).value = page.convention[name === "count" ? "num_params" : "flops"];
  }

  const lawHere = () => page.laws.find(l => l.num_params === chosen("count") && l.flops === chosen("rule"));
  const values = { num_params: i => runs.counts[chosen("count")][i], num_tokens: i => runs.num_tokens[i],
    flops: i => runs.flops[chosen("rule")][i] };
  const predicted = (law, i) => Ask.lossAt(law.best, Math.log(values.num_params(i)), Math.log(runs.num_tokens[i]));
  const residual = (law, i) => 100 * (runs.loss[i] / predicted(law, i) - 1);

  // The runs by budget where sizes are across, by size elsewhere; of many different ones, by ranges of equal ratio.
  function grouped(across) {
    const of = across === "num_params" ? (i => runs.budget[i] ?? Number(values.flops(i).toPrecision(2))) : values.num_params;
    const all = runs.id.map((_, i) => of(i)), different = [...new Set(all)].sort((a, b) => a - b);
    const name = v => across === "num_params" ? `${Words.scientific(v, 2)} FLOPs` : `N = ${Words.compact(v)}`;
    if (different.length <= MOST_GROUPS)
      return { names: different.map(name), middle: different, group: all.map(v => different.indexOf(v)) };
    const low = Math.log(different[0]), width = (Math.log(different.at(-1)) - low) / MOST_GROUPS;
    const ends = i => [Math.exp(low + i * width), Math.exp(low + (i + 1) * width)];
    const short = across === "num_params" ? (v => Words.scientific(v, 2)) : Words.compact;
    return { names: Array.from({ length: MOST_GROUPS }, (_, i) => ends(i).map(short).join("–")), middle: null,
      group: all.map(v => Math.min(Math.floor((Math.log(v) - low) / width), MOST_GROUPS - 1)) };
  }

  // The law's loss at log x for a group: a budget where sizes are across, else a size.
  function lineAt(law, across, middle, logX) {
    if (across === "num_params") return Ask.lossAt(law.best, logX, Math.log(middle) - Ask.logCost(law.cost, logX));
    const n = Math.log(middle);
    return Ask.lossAt(law.best, n, across === "num_tokens" ? logX : logX - Ask.logCost(law.cost, n));
  }

  function draw() {
    const across = chosen("across"), law = lawHere(), up = law ? chosen("up") : "loss", groups = grouped(across);
    section.querySelector("option[value=residual]").disabled = !law;
    section.querySelector("select[name=up]").value = up;
    note.textContent = law ? `Lines: the ${law.name} law fitted by this count of N and this rule of C (${law.source}).`
      : "No law was fitted by this count of N and this rule of C: the runs stand alone.";
    points = runs.id.map((_, i) => [i, Math.log10(values[across](i)), up === "loss" ? runs.loss[i] : residual(law, i), groups.group[i]])
      .filter(p => Number.isFinite(p[X]) && Number.isFinite(p[Y])).sort((a, b) => a[X] - b[X]);
    hidden = new Set([...hidden].filter(g => g < groups.names.length));
    const low = points[0][X], high = points.at(-1)[X], pad = 0.04 * (high - low || 1);
    const lines = law && up === "loss" && groups.middle ? groups.middle.map((middle, g) => {
      const mine = points.filter(p => p[GROUP] === g).map(p => p[X]), [from, to] = [Math.min(...mine) - pad, Math.max(...mine) + pad];
      return x => x < from || x > to ? null : lineAt(law, across, middle, x * Math.LN10);
    }) : groups.names.map(() => () => null);
    const grid = Array.from({ length: GRID + 1 }, (_, i) => low - pad + i * (high - low + 2 * pad) / GRID);
    const xs = [...points.map(p => p[X]), ...grid].sort((a, b) => a - b);
    const all = [...points.map(p => p[Y]), ...lines.flatMap(line => grid.map(line).filter(v => v !== null)), ...(up === "residual" ? [0] : [])];
    const least = all.reduce((a, b) => Math.min(a, b)), most = all.reduce((a, b) => Math.max(a, b));
    const range = [least - 0.05 * (most - least || 1), most + 0.05 * (most - least || 1)];
    const titles = { num_params: `${chosen("count").replaceAll("_", "-")} parameters N`, num_tokens: "training tokens D",
      flops: `training FLOPs C, rule ${chosen("rule")}` };
    const room = (box.clientWidth - 80) / (across === "flops" ? 72 : 48);
    const ticks = (u, axis, from, to) => {
      const found = [[1, 1.5, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]].map(steps => {
        const out = [];
        for (let power = Math.floor(from); power <= to; power++) for (const step of steps) out.push(power + Math.log10(step));
        return out.filter(v => v >= from && v <= to);
      });
      return found.find(out => out.every((v, i) => !i || (v - out[i - 1]) / (to - from) * room >= 1)) ?? found.at(-1);
    };
    const written = v => (across === "flops" ? x => Words.scientific(x, 2) : Words.compact)(10 ** v);
    const font = '13px system-ui, -apple-system, "Segoe UI", "Liberation Sans", Arial, sans-serif';
    const axis = { font, labelFont: font, stroke: "#333", grid: { stroke: "#e8e8e5", width: 1 }, ticks: { stroke: "#bbb", size: 5 } };
    if (chart) chart.destroy();
    chart = new uPlot({
      width: box.clientWidth, height: Math.min(420, Math.max(300, box.clientWidth * 0.6)), legend: { show: false },
      cursor: { show: false },
      scales: { x: { time: false, range: [low - pad, high + pad] }, y: { range } },
      axes: [{ ...axis, splits: ticks, values: (u, splits) => splits.map(written), label: titles[across], space: 60 },
        { ...axis, label: up === "loss" ? `validation loss, ${page.unit}` : "loss above the law, %", size: 62 }],
      series: [{}, ...groups.names.map((name, g) => ({ label: name, stroke: COLOURS[colour(g, groups)], width: 1.4,
        show: !hidden.has(g), points: { show: false }, spanGaps: false }))],
      hooks: { draw: [u => points.forEach(p => hidden.has(p[GROUP]) || mark(u, p, COLOURS[colour(p[GROUP], groups)]))] },
    }, [xs, ...lines.map(line => xs.map(line))], box);
    chart.over.append(ring);
    chart.over.addEventListener("mousemove", e => show(nearest(e.offsetX, e.offsetY)));
    legend(groups);
    show(-1);
  }
  const colour = (g, groups) => groups.names.length < 2 ? 0 : Math.round(g * (COLOURS.length - 1) / (groups.names.length - 1));

  function mark(u, point, ink) {
    const { ctx } = u, x = u.valToPos(point[X], "x", true), y = u.valToPos(point[Y], "y", true);
    shape(ctx, SHAPES[point[GROUP] % SHAPES.length], x, y, (points.length > 2000 ? 2.2 : 4.4) * devicePixelRatio);
    ctx.fillStyle = runs.held_out[point[RUN]] ? "#fff" : ink;
    ctx.strokeStyle = ink;
    ctx.lineWidth = 1.3 * devicePixelRatio;
    ctx.fill();
    if (runs.held_out[point[RUN]]) ctx.stroke();
  }
  function shape(ctx, name, x, y, r) {
    ctx.beginPath();
    if (name === "disc") ctx.arc(x, y, r, 0, 2 * Math.PI);
    else if (name === "square") ctx.rect(x - 0.9 * r, y - 0.9 * r, 1.8 * r, 1.8 * r);
    else {
      const turns = name === "triangle" ? [[0, -1.2], [1.1, 0.8], [-1.1, 0.8]] : [[0, -1.3], [1.2, 0], [0, 1.3], [-1.2, 0]];
      turns.forEach(([dx, dy], i) => i ? ctx.lineTo(x + dx * r, y + dy * r) : ctx.moveTo(x + dx * r, y + dy * r));
      ctx.closePath();
    }
  }

  function legend(groups) {
    keys.replaceChildren(...groups.names.map((name, g) => {
      const button = make("button", "", { type: "button", "aria-pressed": String(!hidden.has(g)) });
      const swatch = make("canvas", "", { width: 24, height: 24, "aria-hidden": "true" }), ctx = swatch.getContext("2d");
      shape(ctx, SHAPES[g % SHAPES.length], 12, 12, 8);
      ctx.fillStyle = COLOURS[colour(g, groups)];
      ctx.fill();
      button.append(swatch, name);
      button.addEventListener("click", () => {
        if (!hidden.delete(g)) hidden.add(g);
        button.setAttribute("aria-pressed", String(!hidden.has(g)));
        chart.setSeries(g + 1, { show: !hidden.has(g) });
        chart.redraw();
        show(-1);
      });
      return button;
    }));
  }

  const visible = i => points[i] && !hidden.has(points[i][GROUP]);
  function nearest(left, top) {
    let best = -1, least = NEAR ** 2;
    points.forEach((p, i) => {
      if (hidden.has(p[GROUP])) return;
      const d = (chart.valToPos(p[X], "x") - left) ** 2 + (chart.valToPos(p[Y], "y") - top) ** 2;
      if (d < least) { least = d; best = i; }
    });
    return best;
  }
  function show(index) {
    at = index;
    ring.hidden = !visible(index);
    if (ring.hidden) {
      card.replaceChildren(make("p", "Point at a run, or focus the chart and use the arrow keys.", { class: "muted" }));
      return;
    }
    const [i, x, y] = points[index], law = lawHere();
    ring.style.left = `${chart.valToPos(x, "x")}px`;
    ring.style.top = `${chart.valToPos(y, "y")}px`;
    const n = values.num_params(i), error = runs.error[i];
    const facts = [["cell", runs.cell[i]], ["N", Words.compact(n)], ["D", Words.compact(runs.num_tokens[i])],
      ["D/N", Words.digits(runs.num_tokens[i] / n)], ["C", Words.scientific(values.flops(i))],
      ["loss", `${runs.loss[i].toFixed(4)}${error === null ? "" : ` ± ${error.toFixed(4)}`}`],
      ["residual", law ? `${residual(law, i) > 0 ? "+" : ""}${residual(law, i).toFixed(2)} %` : "no law"],
      ["peak rate", Words.digits(runs.rate[i])], ["batch", `${runs.batch[i]} tokens`]];
    const list = make("dl");
    for (const [title, text] of facts) if (text !== "") list.append(make("dt", title), make("dd", text));
    const heading = make("p"), link = make("a", "record", { href: `${page.records}${encodeURIComponent(runs.id[i])}.json` });
    heading.append(make("code", runs.id[i]), runs.held_out[i] ? " held out" : "");
    card.replaceChildren(heading, list, ...(page.records === null ? [] : [link]));
  }

  box.addEventListener("keydown", e => {
    const order = points.map((_, i) => i).filter(visible), here = order.indexOf(at);
    const to = { ArrowRight: here + 1, ArrowLeft: here < 0 ? order.length - 1 : here - 1, Home: 0, End: order.length - 1 }[e.key];
    const apart = { ArrowUp: 1, ArrowDown: -1 }[e.key];
    if (e.key === "Escape") show(-1);
    else if (apart && here >= 0) {  // the next run above or below, in the picture
      const rest = order.filter(i => apart * (points[i][Y] - points[at][Y]) > 0);
      const far = i => Math.hypot(chart.valToPos(points[i][X], "x") - chart.valToPos(points[at][X], "x"),
        chart.valToPos(points[i][Y], "y") - chart.valToPos(points[at][Y], "y"));
      if (rest.length) show(rest.reduce((a, b) => far(b) < far(a) ? b : a));
    } else if (to !== undefined || apart) show(order[Math.min(Math.max(to ?? 0, 0), order.length - 1)] ?? -1);
    else return;
    e.preventDefault();
  });
  for (const select of section.querySelectorAll("select")) select.addEventListener("change", draw);
  section.hidden = false;
  draw();
  let width = box.clientWidth;
  addEventListener("resize", () => { if (box.clientWidth !== width) { width = box.clientWidth; draw(); } });
}
