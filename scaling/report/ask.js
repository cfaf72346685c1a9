"use strict";
// Answers the questions of scaling/laws/answers/advice from what fit.json carries for it (advice/carried.py).
// A second implementation, held to the first by tests/test_ask.py: what is asked and why stands there.
const Ask = (() => {
  const MAX_DECADES = 2, WIDTH = 100, SCANNED = 33, SPAN = Math.log(1e4), GOLDEN = (Math.sqrt(5) - 1) / 2, FORWARD = 1 / 3;
  const FLAT = [0.001, 0.005, 0.01], KAPLAN_BATCH = 2.1e8, KAPLAN_EXPONENT = 4.8;
  const E = 0, LOG_A = 1, ALPHA = 2, LOG_B = 3, BETA = 4, GAMMA = 5, PER_SPAN = 6;
  const numbers = text => text ? text.split(" ").map(Number) : [];
  const rows = columns => columns[0].map((_, i) => columns.map(column => column[i]));

  // What the page carries, read once.
  function load(carried) {
    const optimum = {};
    for (const name of ["flops", "loss", "lower", "upper"]) optimum[name] = numbers(carried.optimum[name]);
    optimum.byLaw = Object.entries(carried.optimum.by_law).map(([name, text]) => [name, numbers(text)]);
    const repeated = carried.repeated && { params: carried.repeated.params, draws: carried.repeated.draws && rows(
      Object.values(carried.repeated.draws).map(numbers)).map(
      row => Object.fromEntries(Object.keys(carried.repeated.draws).map((name, i) => [name, row[i]]))) };
    return { ...carried, draws: carried.draws && rows(carried.draws.map(numbers)), optimum, repeated };
  }

  // log FLOPs of a token at log N = x, and the share of them that is beyond 6 N.
  function logCost(cost, x) {
    if (!cost.sign) return Math.log(6 * cost.factor) + x;
    const head = cost.gamma * (Math.log(cost.scale) - x);
    const bend = head > 0 ? head + Math.log1p(Math.exp(-head)) : Math.log1p(Math.exp(head));
    return Math.log(6 * cost.factor) + x + cost.sign * bend;
  }
  const headShare = (cost, x) => 1 / (1 + Math.exp(cost.gamma * (x - Math.log(cost.scale))));

  // A law: E + r / (1 + k r), r = (A N^-α + B D^-β)^γ. A fit.json of before carries fewer numbers: γ was 1, k 0.
  const power = law => law[GAMMA] ?? 1, perSpan = law => law[PER_SPAN] ?? 0;
  function lossAt(law, n, d) {
    const r = (Math.exp(law[LOG_A] - law[ALPHA] * n) + Math.exp(law[LOG_B] - law[BETA] * d)) ** power(law);
    return law[E] + r / (1 + perSpan(law) * r);
  }
  function riseOf(law, loss) {  // r of a loss: infinite from the ceiling on
    const above = loss - law[E], left = 1 - perSpan(law) * above;
    return left > 0 ? above / left : Infinity;
  }

  // log N* for log C: in closed form for C = f 6 N D, else the root of the balance, by Newton's steps or by halving.
  function bestSize(data, law, logC) {
    const cost = data.cost, ratio = Math.log(law[ALPHA]) + law[LOG_A] - Math.log(law[BETA]) - law[LOG_B];
    const closed = (ratio + law[BETA] * (logC - Math.log(6 * cost.factor))) / (law[ALPHA] + law[BETA]);
    if (!cost.sign) return closed;
    const elasticity = x => 1 - cost.sign * cost.gamma * headShare(cost, x);
    const rise = x => elasticity(x) <= 0 ? -Infinity
      : law[ALPHA] * x - law[BETA] * (logC - logCost(cost, x)) + Math.log(elasticity(x)) - ratio;
    let x = closed;
    for (let i = 0; i < 40; i++) {
      const share = headShare(cost, x), e = elasticity(x);
      const bend = cost.sign * cost.gamma ** 2 * share * (1 - share);
      const step = rise(x) / (law[ALPHA] + law[BETA] * e + bend / e);
      x -= step;
      if (Math.abs(step) < 1e-12 * Math.max(Math.abs(x), 1)) return x;
    }
    return root(rise, closed - WIDTH, closed + WIDTH);
  }

  function root(rises, low, high) {  // where a rising function crosses zero
    for (let i = 0; i < 60; i++) {
      const middle = (low + high) / 2;
      if (rises(middle) <= 0) low = middle; else high = middle;
    }
    return (low + high) / 2;
  }

  // Where a function is lowest: the best of some places, then golden section between its neighbours (basis.lowest).
  function lowest(f, low, high) {
    const place = i => low + Math.min(Math.max(i, 0), SCANNED - 1) / (SCANNED - 1) * (high - low);
    let best = 0, least = Infinity;
    for (let i = 0; i < SCANNED; i++) { const v = f(place(i)); if (v < least) { best = i; least = v; } }
    [low, high] = [place(best - 1), place(best + 1)];
    let c = high - GOLDEN * (high - low), d = low + GOLDEN * (high - low), atC = f(c), atD = f(d);
    for (let i = 0; i < 45; i++) {
      if (atC < atD) { high = d; d = c; atD = atC; c = high - GOLDEN * (high - low); atC = f(c); }
      else { low = c; c = d; atC = atD; d = low + GOLDEN * (high - low); atD = f(d); }
    }
    return (low + high) / 2;
  }

  // log C at which a model of this size has the loss; infinite where no tokens bring it there.
  function logPaidAtSize(data, law, loss, x) {
    const rest = riseOf(law, loss) ** (1 / power(law)) - Math.exp(law[LOG_A] - law[ALPHA] * x);
    return rest > 0 ? (law[LOG_B] - Math.log(rest)) / law[BETA] + logCost(data.cost, x) : Infinity;
  }

  // Equal-tailed percentiles of numbers, interpolated or the nearest of them (half to even, as NumPy has it).
  function percentiles(draws, level, nearest) {
    const sorted = Float64Array.from(draws.filter(v => !Number.isNaN(v))).sort(), tail = 0.5 * (1 - level);
    return [tail, 1 - tail].map(q => {
      const at = q * (sorted.length - 1), low = Math.floor(at);
      if (nearest) return sorted[at - low === 0.5 ? low + low % 2 : Math.round(at)];
      return sorted[low] + (at - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
    });
  }

  // The interval of draws some of which may be 0 or infinite: beyond every end (resampling.percentiles).
  function interval(draws, level) {
    const [low, high] = percentiles(draws, level, draws.some(v => !Number.isFinite(v) || v === 0));
    return [low === 0 ? -Infinity : low, high];
  }

  // {name: {value, interval, unit, byForm}} of what ``quantities`` finds of each law, a list in the order of ``units``.
  function told(data, units, decades, withDraws, quantities) {
    const names = Object.keys(units), value = quantities(data.best), near = decades <= MAX_DECADES;
    const drawn = withDraws && near && data.draws ? data.draws.map(quantities) : null;
    const others = Object.entries(data.others).map(([form, law]) => [form, quantities(law)]);
    return Object.fromEntries(names.map((name, i) => [name, {
      value: value[i], unit: units[name], interval: drawn && interval(drawn.map(row => row[i]), data.level),
      byForm: Object.fromEntries(others.map(([form, row]) => [form, row[i]])),
    }]));
  }
  const decadesOf = (data, flops) => Math.log10(flops < data.bottom ? data.bottom / flops : flops / data.top);

  // What to train for the budget of this number (questions.of_budget).
  function ofBudget(data, index, withDraws) {
    const { optimum } = data, flops = optimum.flops[index], logC = Math.log(flops), decades = decadesOf(data, flops);
    const units = { num_params: "parameters", num_tokens: "tokens", tokens_per_param: "tokens per parameter" };
    for (const share of FLAT) for (const word of ["least", "most"])
      units[`num_params within ${100 * share} % of the best loss, ${word}`] = "parameters";
    for (const word of ["half", "twice"]) {
      units[`loss lost by ${word} the size`] = "%";
      units[`overhead of ${word} the size`] = "%";
    }
    const found = told(data, units, decades, withDraws, law => {
      const best = bestSize(data, law, logC), tokens = Math.exp(logC - logCost(data.cost, best));
      const loss = x => lossAt(law, x, logC - logCost(data.cost, x)), least = loss(best);
      const out = [Math.exp(best), tokens, tokens / Math.exp(best)];
      for (const share of FLAT) for (const side of [-1, 1]) {
        const worse = step => loss(best + side * step) - least * (1 + share);
        out.push(Math.exp(best + side * root(worse, 0, WIDTH)));
      }
      for (const factor of [0.5, 2]) {
        const x = best + Math.log(factor);
        out.push(100 * (loss(x) / least - 1), 100 * (Math.exp(logPaidAtSize(data, law, least, x) - logC) - 1));
      }
      return out;
    });
    if (flops >= data.top * (1 - 1e-9)) for (const [name, open] of Object.entries(data.open_ends)) {
      const ends = found[name].interval;
      if (ends) found[name].interval = [open[0] ? -Infinity : ends[0], open[1] ? Infinity : ends[1]];
    }
    const loss = {
      value: optimum.loss[index], unit: "nats", byForm: Object.fromEntries(optimum.byLaw.map(([n, v]) => [n, v[index]])),
      interval: index < optimum.lower.length ? [optimum.lower[index], optimum.upper[index]] : null,
    };
    return { flops, decades, numbers: { ...found, loss } };
  }

  // The model of least lifetime cost, in FLOPs, at the quality of a budget (machines.of_inference).
  function ofInference(data, flops, tokens, withDraws) {
    const logC = Math.log(flops);
    const solved = law => {
      const best = bestSize(data, law, logC), target = lossAt(law, best, logC - logCost(data.cost, best));
      const cost = x => Math.exp(logPaidAtSize(data, law, target, x)) + tokens * FORWARD * Math.exp(logCost(data.cost, x));
      const x = lowest(cost, best - SPAN, best + SPAN / 4);
      const d = Math.exp(logPaidAtSize(data, law, target, x) - logCost(data.cost, x));
      return [Math.exp(x), d, cost(x), cost(best), 100 * (1 - cost(x) / cost(best))];
    };
    const units = { num_params: "parameters", num_tokens: "tokens", "lifetime cost": "FLOPs",
      "compute-optimal model's lifetime cost": "FLOPs", "its share saved": "%" };
    const [n, d] = solved(data.best), decades = decadesOf(data, d * Math.exp(logCost(data.cost, Math.log(n))));
    return { decades, numbers: told(data, units, decades, withDraws, solved) };
  }

  function repeatedLoss(p, n, d, unique) {  // Muennighoff et al. 2023, as forms/catalogue.py has it
    const U = Math.min(unique, d), G = (p.alpha * p.A / (p.beta * p.B)) ** (1 / (p.alpha + p.beta));
    const base = Math.min((U * G) ** (p.beta / p.alpha) * G, n);
    const size = base * (1 - p.R_N * Math.expm1(-Math.max(n / base - 1, 0) / p.R_N));
    const seen = U * (1 - p.R_D * Math.expm1(-Math.max(d / U - 1, 0) / p.R_D));
    return p.E + p.A * size ** -p.alpha + p.B * seen ** -p.beta;
  }

  // What becomes of a budget's optimum when so many of its tokens are different (questions.of_data).
  function ofData(data, flops, unique, withDraws) {
    const logC = Math.log(flops), best = bestSize(data, data.best, logC), decades = decadesOf(data, flops);
    const tokens = Math.exp(logC - logCost(data.cost, best));
    const found = { epochs: { value: Math.max(tokens / unique, 1), interval: null, unit: "epochs", byForm: {} } };
    if (!data.repeated) return { decades, numbers: found, covered: tokens <= unique };
    const grid = Array.from({ length: 1201 }, (_, i) => best - 6 + i * 0.01);
    const sizes = grid.map(Math.exp), read = grid.map(x => Math.exp(logC - logCost(data.cost, x)));
    const least = (p, U) => {
      let at = 0, loss = Infinity;
      for (let i = 0; i < grid.length; i++) {
        const here = repeatedLoss(p, sizes[i], read[i], U);
        if (here < loss) { loss = here; at = i; }
      }
      return [at, loss];
    };
    const quantities = p => {
      const [at, loss] = least(p, unique);
      return [sizes[at], read[at] / unique, loss, loss - least(p, 2 * unique)[1]];
    };
    const units = { "num_params, tokens repeated": "parameters", "epochs, tokens repeated": "epochs", "loss, tokens repeated": "nats",
      "loss less by twice the unique tokens": "nats" };
    const value = quantities(data.repeated.params), near = decades <= MAX_DECADES;
    const drawn = withDraws && near && data.repeated.draws ? data.repeated.draws.map(quantities) : null;
    Object.entries(units).forEach(([name, unit], i) => {
      const ends = drawn && percentiles(drawn.map(row => row[i]), data.level, false);
      found[name] = { value: value[i], unit, byForm: {}, interval: ends };
    });
    return { decades, numbers: found, covered: true };
  }

  function mfu(points, n) {  // devices.mfu_of: between two published sizes linear in log N, else the nearest's
    if (n <= points[0][0]) return points[0][1];
    for (let i = 1; i < points.length; i++) if (n <= points[i][0]) {
      const [low, high] = [points[i - 1], points[i]];
      return low[1] + Math.log(n / low[0]) / Math.log(high[0] / low[0]) * (high[1] - low[1]);
    }
    return points[points.length - 1][1];
  }

  // The best model by a deadline on so many devices of a kind (machines.of_deadline).
  function ofDeadline(data, seconds, devices, machine, withDraws) {
    const rate = x => Math.log(machine.peak_flops * mfu(machine.mfu, Math.exp(x)));
    const read = x => Math.log(seconds * devices) + rate(x) - logCost(data.cost, x), batch = devices * machine.batch;
    const crit = loss => KAPLAN_BATCH * loss ** -KAPLAN_EXPONENT;
    const worth = (law, x) => {  // log D that the tokens read are worth, and the loss
      const seen = read(x);
      let d = seen;
      for (let i = 0; i < 60; i++) {
        const paid = Math.log1p(data.own_batch ?? 0) - Math.log1p(batch / crit(lossAt(law, x, d)));
        const next = 0.5 * (d + seen + paid), step = Math.abs(next - d);
        d = next;
        if (step < 1e-12) break;
      }
      return [d, lossAt(law, x, d)];
    };
    const solved = law => {
      let middle = bestSize(data, law, Math.log(data.top));
      for (let i = 0; i < 20; i++) middle = bestSize(data, law, Math.log(seconds * devices) + rate(middle));
      const x = lowest(x => worth(law, x)[1], middle - SPAN, middle + SPAN / 2), [d, loss] = worth(law, x);
      return [Math.exp(x), Math.exp(read(x)), Math.exp(d), loss, Math.exp(read(x)) / batch];
    };
    const [n, d, , loss] = solved(data.best), flops = d * Math.exp(logCost(data.cost, Math.log(n)));
    const decades = decadesOf(data, flops);
    const units = { num_params: "parameters", num_tokens: "tokens", "tokens they are worth": "tokens", loss: "nats",
      steps: "steps" };
    const alone = (value, unit) => ({ value, unit, interval: null, byForm: {} });
    const found = told(data, units, decades, withDraws, solved);
    found.batch = alone(batch, "tokens");
    found["critical batch"] = alone(crit(loss), "tokens");
    found.flops = alone(flops, "FLOPs");
    if (machine.price !== null) found.cost = alone(machine.price / 3600 * devices * seconds, "dollars");
    return { decades, numbers: found };
  }

  return { load, ofBudget, ofInference, ofData, ofDeadline, lossAt, logCost, MAX_DECADES };
})();
