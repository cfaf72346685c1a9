"use strict";
// The panel that asks the law: its sliders, and what Ask answers, in words and numbers.
const Words = (() => {
  const SUPERSCRIPT = "⁰¹²³⁴⁵⁶⁷⁸⁹";
  const digits = (v, n = 3) => Math.abs(v) >= 1e6 || (v !== 0 && Math.abs(v) < 1e-3) ? scientific(v, n)
    : String(Number(v.toPrecision(n)));
  function scientific(v, n = 3) {
    if (!Number.isFinite(v) || v === 0) return String(v);
    const [mantissa, power] = v.toExponential(n - 1).split("e"), factor = String(Number(mantissa));
    const raised = String(Number(power)).replace("-", "⁻").replace(/\d/g, d => SUPERSCRIPT[d]);
    return `${factor === "1" ? "" : `${factor}×`}10${raised}`;
  }
  function compact(v) {  // 950, 30K, 1.25M, 7B: as numbers.compact
    if (!Number.isFinite(v) || v === 0) return String(v);
    v = Number(v.toPrecision(3));
    const group = Math.min(Math.max(Math.floor(Math.log10(Math.abs(v)) / 3), 0), 4);
    const scaled = v / 1000 ** group;
    return scaled >= 1e4 || scaled < 1e-3 ? scientific(v) : `${Number(scaled.toPrecision(3))}${["", "K", "M", "B", "T"][group]}`;
  }
  const BY_UNIT = {
    parameters: compact, tokens: compact, steps: compact, FLOPs: scientific, nats: v => v.toFixed(4),
    dollars: v => v >= 1000 ? Math.round(v).toLocaleString("en") : digits(v), "%": v => digits(v, 2),
  };
  const ended = v => v === 0 || (Math.abs(v) > 1e-40 && Math.abs(v) < 1e40); // as scaling.numbers has it
  const write = (v, unit) => ended(v) ? (BY_UNIT[unit] ?? digits)(v) : "unbounded";
  const range = (ends, unit) => !ends ? "" : ends[0] === ends[1] ? write(ends[0], unit)
    : `${write(ends[0], unit)}\u200a–\u200a${write(ends[1], unit)}`;
  return { digits, scientific, compact, write, range };
})();

const make = (tag, text = "", attributes = {}) => {
  const element = document.createElement(tag);
  element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
};

function askPanel(page) {
  const section = document.getElementById("ask");
  if (!section || !page.ask) return;
  const data = Ask.load(page.ask), last = data.optimum.flops.length - 1;
  const STEPS = [1, 1.2, 1.5, 1.8, 2.2, 2.7, 3.3, 3.9, 4.7, 5.6, 6.8, 8.2];
  const between = (low, high) => {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const step of STEPS) found.push(Number(`${step}e${power}`));
    return found.filter(v => v >= low && v <= high);
  };
  const tokensAt = i => Ask.ofBudget(data, i, false).numbers.num_tokens.value;
  const HOUR = 3600, DAY = 24 * HOUR;
  const times = [[HOUR, "1 hour"], [4 * HOUR, "4 hours"], [12 * HOUR, "12 hours"], [DAY, "1 day"], [2 * DAY, "2 days"],
    [4 * DAY, "4 days"], [7 * DAY, "1 week"], [14 * DAY, "2 weeks"], [30 * DAY, "30 days"], [60 * DAY, "60 days"],
    [90 * DAY, "90 days"], [180 * DAY, "180 days"], [365 * DAY, "1 year"]];
  const unique = between(tokensAt(0) / 100, tokensAt(last));
  const machine = () => page.machines.find(m => m.name === section.querySelector("select").value);
  // Each: its values, the words for one, and where it begins.
  const sliders = {
    budget: { values: data.optimum.flops, words: v => `${Words.scientific(v, 2)} FLOPs` },
    inference: { values: [0, ...between(tokensAt(0) / 10, tokensAt(last) * 1e3)],
      words: v => v ? `${Words.compact(v)} tokens` : "none" },
    unique: { values: [...unique, Infinity], words: v => Number.isFinite(v) ? Words.compact(v) : "as many as are read" },
    devices: { values: Array.from({ length: 15 }, (_, i) => 2 ** i), words: v => v === 1 ? "1 device" : `${v} devices` },
    deadline: { values: [0, ...times.map(t => t[0])], words: v => v ? times.find(t => t[0] === v)[1] : "none" },
  };
  const begin = { budget: data.optimum.flops.findIndex(v => v >= data.top * 0.95), inference: 0, unique: unique.length,
    devices: 3, deadline: 0 };
  const setting = {};

  for (const [name, { values, words }] of Object.entries(sliders)) {
    const input = section.querySelector(`input[name=${name}]`), said = input.parentNode.querySelector("output");
    Object.assign(input, { min: 0, max: values.length - 1, step: 1, value: begin[name] });
    const read = () => {
      setting[name] = values[Number(input.value)];
      said.textContent = words(setting[name]);
      input.setAttribute("aria-valuetext", words(setting[name]));
    };
    input.addEventListener("input", () => { read(); answer(); });
    read();
  }
  for (const m of page.machines) section.querySelector("select").append(make("option", m.title, { value: m.name }));
  section.querySelector("select").addEventListener("change", () => answer());

  // Far from the data the forms' spread stands where an interval would.
  function endsOf(number, far) {
    const said = Object.values(number.byForm);
    return far && said.length ? [Math.min(...said), Math.max(...said)] : number.interval;
  }
  function row(title, number, far) {
    const line = make("tr");
    line.append(make("td", title, { class: "l" }), make("td", Words.write(number.value, number.unit)));
    line.append(make("td", Words.range(endsOf(number, far), number.unit), { class: "muted" }));
    return line;
  }
  function table(caption, entries, decades, drawn) {
    const far = decades > Ask.MAX_DECADES, element = make("table"), head = make("tr"), body = make("tbody");
    head.append(make("th", caption, { class: "l", scope: "col" }), make("th", "value", { scope: "col" }));
    const percent = `${Math.round(100 * data.level)} % interval`;
    head.append(make("th", far ? "other forms" : data.draws || !drawn ? percent : "no draws, no interval", { scope: "col" }));
    for (const [title, number] of entries) body.append(row(title, number, far));
    element.append(make("thead"), body);
    element.firstChild.append(head);
    return element;
  }
  // Rows of a title and two numbers, each with what surrounds it.
  function pairs(heads, entries, decades, drawn) {
    const far = decades > Ask.MAX_DECADES, element = make("table", "", { class: "pairs" }), head = make("tr");
    const body = make("tbody"), around = far ? "other forms" : data.draws || !drawn ? `${Math.round(100 * data.level)} %` : "";
    heads.forEach((text, i) => {
      head.append(make("th", text, { scope: "col", class: i ? "" : "l" }));
      if (i) head.append(make("th", around, { scope: "col" }));
    });
    for (const [title, ...numbers] of entries) {
      const line = make("tr");
      line.append(make("td", title, { class: "l" }));
      for (const number of numbers) line.append(...[...row("", number, far).children].slice(1));
      body.append(line);
    }
    element.append(make("thead"), body);
    element.firstChild.append(head);
    return element;
  }
  const reach = decades => decades > Ask.MAX_DECADES
    ? `${decades.toFixed(1)} decades outside the fitted compute: no interval is worth it there; what other forms say stands instead.`
    : decades > 0.02 ? `${decades.toFixed(1)} decades outside the fitted compute.` : "Within the fitted compute.";

  // A strip of sizes: how far from the best the loss stays within a share of it.
  function strip(numbers) {
    const shares = [1, 0.5, 0.1], size = (share, word) =>
      numbers[`num_params within ${share} % of the best loss, ${word}`].value;
    const low = Math.log(size(1, "least")) - 0.25, high = Math.log(size(1, "most")) + 0.25;
    const at = v => `${(100 * (Math.log(v) - low) / (high - low)).toFixed(2)}%`;
    const box = make("div", "", { class: "strip", role: "img", "aria-label": `Within 1 % of the best loss: ${
      Words.compact(size(1, "least"))} to ${Words.compact(size(1, "most"))} parameters` });
    for (const share of shares) {
      const bar = make("i", "", { class: `within-${String(share).replace(".", "")}` });
      bar.style.left = at(size(share, "least"));
      bar.style.right = `calc(100% - ${at(size(share, "most"))})`;
      box.append(bar);
    }
    const best = make("b");
    best.style.left = at(numbers.num_params.value);
    box.append(best);
    for (const word of ["least", "most"]) {
      const label = make("span", Words.compact(size(1, word)));
      label.style.left = at(size(1, word));
      box.append(label);
    }
    const label = make("span", "N*");
    label.style.left = at(numbers.num_params.value);
    box.append(label);
    return box;
  }

  function headline(number, title, far) {
    const box = make("div"), ends = endsOf(number, far);
    box.append(make("b", Words.write(number.value, number.unit)));
    box.append(make("i", ends ? `${far ? "forms: " : ""}${Words.range(ends, number.unit)}` : "\u00a0"), make("span", title));
    return box;
  }

  function show(drawn) {
    const out = section.querySelector(".told"), index = Number(section.querySelector("input[name=budget]").value);
    const budget = Ask.ofBudget(data, index, drawn), n = budget.numbers, far = budget.decades > Ask.MAX_DECADES;
    const big = make("div", "", { class: "answers" });
    big.append(headline(n.num_params, "parameters, N*", far), headline(n.num_tokens, "tokens, D*", far),
      headline(n.tokens_per_param, "tokens per parameter", far), headline(n.loss, page.unit, far));
    const parts = [big, make("p", reach(budget.decades), { class: "small muted" })];
    const flat = ["0.1", "0.5", "1"].map(share => [`within ${share} %`, ...["least", "most"].map(word =>
      n[`num_params within ${share} % of the best loss, ${word}`])]);
    parts.push(make("h3", "Sizes nearly as good"), strip(n),
      pairs(["loss", "smallest", "largest"], flat, budget.decades, drawn));
    parts.push(make("h3", "What a wrong size costs"), pairs(["size", "loss, %", "compute, %"],
      ["half", "twice"].map(word => [`${word} of N*`.replace("twice of", "twice"), n[`loss lost by ${word} the size`],
        n[`overhead of ${word} the size`]]), budget.decades, drawn),
      make("p", "Loss above the least for the budget; further compute to reach that least at this size.", { class: "small muted" }));
    if (setting.inference) {
      const served = Ask.ofInference(data, setting.budget, setting.inference, drawn), s = served.numbers;
      parts.push(make("h3", `Serving ${Words.compact(setting.inference)} tokens at that loss`), table("cheapest over its life", [
        ["parameters", s.num_params], ["tokens", s.num_tokens], ["training and serving, FLOPs", s["lifetime cost"]],
        ["of the compute-optimal model, FLOPs", s["compute-optimal model's lifetime cost"]],
        ["saved, %", s["its share saved"]]], served.decades, drawn), make("p", reach(served.decades), { class: "small muted" }));
    }
    if (Number.isFinite(setting.unique)) {
      const found = Ask.ofData(data, setting.budget, setting.unique, drawn), d = found.numbers;
      const titles = { [d["epochs, tokens repeated"] ? "epochs, tokens repeated" : "epochs"]: "epochs", "num_params, tokens repeated": "parameters",
        "loss, tokens repeated": `loss, ${page.unit}`, "loss less by twice the unique tokens": "less by twice the unique tokens" };
      parts.push(make("h3", `With ${Words.compact(setting.unique)} tokens that are different`), table("",
        Object.entries(titles).filter(([name]) => d[name]).map(([name, title]) => [title, d[name]]), found.decades, drawn));
      if (!found.covered) parts.push(make("p",
        "Repetition is not covered by the laws fitted here: the numbers above take every token for new.", { class: "small" }));
    }
    if (setting.deadline) {
      const m = machine(), found = Ask.ofDeadline(data, setting.deadline, setting.devices, m, drawn), t = found.numbers;
      const rows = [["parameters", t.num_params], ["tokens read", t.num_tokens], ["tokens they are worth", t["tokens they are worth"]],
        [`loss, ${page.unit}`, t.loss], ["steps", t.steps], ["batch, tokens", t.batch], ["critical batch, tokens", t["critical batch"]],
        ["training FLOPs", t.flops], ...(t.cost ? [["dollars", t.cost]] : [])];
      parts.push(make("h3", `In ${sliders.deadline.words(setting.deadline)} on ${setting.devices} × ${m.title}`),
        table("best by then", rows, found.decades, drawn), make("p", `${reach(found.decades)} The critical batch is that of Kaplan et al. 2020 `
          + "for WebText2: of other text a guess. Utilisation is taken to stay as devices are added.", { class: "small muted" }));
    }
    out.replaceChildren(...parts);
    section.dataset.drawn = drawn;
  }

  let waiting;
  function answer() {  // values at once, their intervals when the hand rests
    show(false);
    clearTimeout(waiting);
    waiting = setTimeout(() => show(true), 80);
  }
  section.hidden = false;
  answer();
}
