"use strict";
// What the model and the annotators wrote is text here: it becomes text nodes, never HTML.
(() => {
  const { titles, steps } = JSON.parse(document.getElementById("data").textContent);
  const [slider, fault, order, number, status, groups] = ["step", "fault", "order", "number", "status", "groups"].map(
    (id) => document.getElementById(id));
  const TAGGED = /(<timestamp>[^<]{0,200}<\/timestamp>)|(<answer>[^<]{0,200}<\/answer>)/g;
  const ABOVE = [195, 155, 211], BELOW = [244, 184, 96];
  const everything = steps.flatMap((step) => step.groups.flatMap((group) => group.rollouts));
  const most = Math.max(1e-9, ...steps.map((step) => Math.max(0, ...step.groups.flatMap(
    (group) => group.rollouts.flatMap((rollout) => rollout.parts.map(([, value]) => Math.abs(value ?? 0)))))));

  const make = (name, className, ...children) => {
    const element = document.createElement(name);
    if (className) element.className = className;
    element.append(...children.filter((child) => child !== null));
    return element;
  };
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const decimals = (value) => value.toFixed(2).replace("-", "\u2212");
  const signed = (value) => (value < 0 ? "" : "+") + decimals(value);
  const inWords = (name) => name.replaceAll("_", " ");
  const plural = (count, noun, many) => `${count} ${count === 1 ? noun : many}`;

  const colour = (value) => {
    const end = value > 0 ? ABOVE : BELOW, share = Math.min(1, Math.abs(value) / most);
    return `rgb(${end.map((part) => Math.round(255 + share * (part - 255))).join(" ")})`;
  };

  // -- one completion ------------------------------------------------------------------------------------------------

  const marked = (text) => {
    const pieces = [];
    let end = 0;
    for (const match of text.matchAll(TAGGED)) {
      pieces.push(text.slice(end, match.index), make("mark", match[1] ? "anchor" : "answer", match[0]));
      end = match.index + match[0].length;
    }
    return [...pieces, text.slice(end)];
  };

  const part = ([text, value]) => {
    if (value === null) return make("span", "part", ...marked(text));
    const badge = make("b", "", make("span", "spoken", "advantage "), signed(value), make("span", "spoken", ": "));
    const element = make("span", "part", badge, ...marked(text));
    element.style.background = colour(value);
    return element;
  };

  const seconds = ([start, end]) => `${start.toFixed(2)} to ${end.toFixed(2)} s`;

  const bar = (className, [start, end], duration) => {
    const from = Math.max(0, start), to = Math.min(end, duration);
    if (to < from || from > duration) return null;
    const element = make("span", className);
    element.style.left = `${100 * from / duration}%`;
    element.style.width = `${100 * (to - from) / duration}%`;
    return element;
  };

  const lane = (label, kind, spans, group, note) => {
    const bands = kind === "truth" ? [] : group.windows.map((window) => bar("band", window, group.duration));
    const bars = spans.map((span) => bar(`bar ${kind}`, span, group.duration));
    const track = make("span", "track", ...bands, ...bars);
    track.setAttribute("aria-hidden", "true");
    const odd = spans.some(([start, end]) => end < start) ? " (reversed)"
      : spans.length && bars.every((found) => found === null) ? " (outside)" : "";
    const text = spans.length ? spans.map(seconds).join(", ") + odd + note : kind === "answer" ? "unreadable" : "none";
    return make("div", "lane", make("span", "label", label), track, make("span", "numbers", text));
  };

  const completion = (rollout, group) => {
    const { anchors, anchor_ious: ious, answer } = rollout;
    const heading = make("h4", "", `Completion ${rollout.number}: reward ${decimals(rollout.total)}`,
      ...rollout.faults.flatMap((name) => [" ", make("span", "fault", inWords(name))]));
    const terms = [...Object.entries(rollout.terms).map(([name, value]) => [titles[name] ?? name, value]),
      ["disagreement", rollout.disagreement]];
    const list = make("dl", "terms", ...terms.map(
      ([name, value]) => make("div", "", make("dt", "", name), make("dd", "", decimals(value)))));
    const text = make("p", "text", ...rollout.parts.map(part), rollout.more ? ` … ${rollout.more} more characters` : "",
      rollout.parts.length ? "" : "(empty)");
    const lanes = [
      ...anchors.map((span, i) => lane(`anchor ${i + 1}`, "anchor", [span], group,
        ious[i] === undefined ? "" : `, soft IoU ${decimals(ious[i])}`)),
      lane("answer", "answer", answer ? [answer] : [], group, `, IoU ${rollout.answer_iou.toFixed(2)}`),
    ];
    const strip = make("div", "strip", ...(group.duration > 0 ? lanes : []));
    return make("li", "rollout", make("div", "", heading, list, text), strip);
  };

  // -- one query -----------------------------------------------------------------------------------------------------

  const axis = (duration) => {
    const rough = duration / 5, power = 10 ** Math.floor(Math.log10(rough));
    const gap = [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= rough);
    const marks = make("span", "axis");
    for (let tick = 0; tick <= duration; tick += gap) {
      const mark = make("span", "", String(Number(tick.toPrecision(6))));
      mark.style.left = `${100 * tick / duration}%`;
      marks.append(mark);
    }
    const row = make("div", "lane seconds", make("span", "label", "seconds"), marks);
    row.setAttribute("aria-hidden", "true");
    return row;
  };

  const query = (group, shown) => {
    const average = decimals(mean(group.rollouts.map((rollout) => rollout.total)));
    const meta = `${group.video}, ${group.duration.toFixed(1)} s; mean reward ${average}; `
      + `${shown.length} of ${group.rollouts.length} shown`;
    const strip = make("div", "strip", ...(group.duration > 0
      ? [lane("truth", "truth", group.windows, group, ""), axis(group.duration)] : []));
    const heading = make("h3", "", group.query);
    const header = make("header", "", make("div", "", heading, make("p", "meta", meta)), strip);
    return make("article", "group", header, make("ol", "", ...shown.map((rollout) => completion(rollout, group))));
  };

  // -- the page ------------------------------------------------------------------------------------------------------

  const KEYS = {
    highest: (rollout) => -rollout.total,
    lowest: (rollout) => rollout.total,
    disagreement: (rollout) => -rollout.disagreement,
  };
  const isWanted = (rollout) => fault.value === "" || (fault.value === "none"
    ? rollout.faults.length === 0 : rollout.faults.includes(fault.value));

  const sorted = (items, key) => (key ? [...items].sort((a, b) => key(a) - key(b)) : items);

  const show = () => {
    const step = steps[Number(slider.value)], key = KEYS[order.value];
    // Queries follow the mean of all their completions, whichever are shown.
    const ranked = sorted(step.groups, key && ((group) => mean(group.rollouts.map(key))));
    const found = ranked.map((group) => [group, sorted(group.rollouts.filter(isWanted), key)]).filter(
      ([, shown]) => shown.length);
    groups.replaceChildren(...found.map(([group, shown]) => query(group, shown)));
    const all = step.groups.flatMap((group) => group.rollouts);
    const count = found.reduce((sum, [, shown]) => sum + shown.length, 0);
    const left = step.of - step.groups.length;
    number.textContent = String(step.step);
    slider.setAttribute("aria-valuetext", `step ${step.step}`);
    status.textContent = `Step ${step.step}: ${count} of ${plural(all.length, "completion", "completions")} to `
      + `${plural(step.groups.length, "query", "queries")}, mean reward ${decimals(mean(all.map((r) => r.total)))}.`
      + (left ? ` ${plural(left, "query is", "queries are")} left out for size.` : "");
  };

  const choices = () => {
    const counts = new Map();
    everything.forEach((rollout) => rollout.faults.forEach((name) => counts.set(name, (counts.get(name) ?? 0) + 1)));
    const none = everything.filter((rollout) => rollout.faults.length === 0).length;
    const names = [...counts].sort((a, b) => b[1] - a[1]);
    const rows = [["", `all completions (${everything.length})`], ["none", `no fault (${none})`],
      ...names.map(([name, count]) => [name, `${inWords(name)} (${count})`])];
    return rows.map(([value, text]) => new Option(text, value));
  };

  fault.append(...choices());
  for (const id of ["lowest", "highest"]) {
    const end = document.getElementById(id);
    if (end) end.textContent = signed(id === "lowest" ? -most : most);
  }
  [slider, fault, order].forEach((control) => control.addEventListener("input", show));
  slider.form.addEventListener("submit", (event) => event.preventDefault());
  show();
})();
