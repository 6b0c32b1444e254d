// Elements, numbers and names as a person reads them. Text only ever becomes text nodes.

export const at = id => document.getElementById(id);

/** An element with attributes (`class`, `aria-...`), `style` custom properties and children. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") for (const [key, each] of Object.entries(value)) element.style.setProperty(key, each);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter(child => child !== null && child !== undefined));
  return element;
}

/** Sets text only where it differs: a screen reader hears of changes alone. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export const known = value => value !== null && value !== undefined;
export const count = value => value.toLocaleString("en");
export const percent = (share, digits = 1) => (100 * share).toFixed(digits) + "%";
export const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

export function seconds(value) {
  if (value >= 100) return duration(value);
  if (value >= 1) return value.toFixed(2) + " s";
  return value >= 0.001 ? (value * 1000).toFixed(value >= 0.1 ? 0 : 1) + " ms" : (value * 1e6).toFixed(0) + " \u00b5s";
}

export function duration(value) {
  const whole = Math.max(0, Math.round(value)), h = Math.floor(whole / 3600), m = Math.floor(whole / 60) % 60, s = whole % 60;
  return h ? `${h} h ${String(m).padStart(2, "0")} min` : m ? `${m} min ${String(s).padStart(2, "0")} s` : `${s} s`;
}

export function amount(value) {
  for (const [size, unit] of [[1e9, " G"], [1e6, " M"], [1e3, " k"]]) {
    if (value >= size) return (value / size).toFixed(value >= 100 * size ? 0 : 1) + unit;
  }
  return String(value);
}

export const clock = time => new Date(time * 1000).toLocaleTimeString("en-GB");

/** 0-3, 6, 8-9 of ascending numbers. */
export function ranges(numbers) {
  const parts = [];
  for (let i = 0; i < numbers.length; i++) {
    let j = i;
    while (j + 1 < numbers.length && numbers[j + 1] === numbers[j] + 1) j++;
    parts.push(j > i + 1 ? `${numbers[i]}\u2013${numbers[j]}` : numbers.slice(i, j + 1).join(", "));
    i = j;
  }
  return parts.join(", ");
}

export const layers = stage => stage.stop - stage.first === 1
  ? `layer ${stage.first}` : `layers ${stage.first}\u2013${stage.stop - 1}`;

/** The micro-batches of each worker, by worker; all of a team have those of its lead. */
export function dealt(plan) {
  const found = new Map();
  for (const stage of plan.stages) for (const worker of stage.workers) found.set(worker, []);
  const teams = new Map((plan.teams ?? []).map(team => [team[0], team]));
  for (const row of plan.assignment)
    row.forEach((lead, m) => { for (const worker of teams.get(lead) ?? [lead]) found.get(worker)?.push(m); });
  return found;
}

export const KIND_NAMES = {
  forward: "forward", backward: "backward", wait: "wait for a stage", data: "data", held_out: "held-out", reduce: "reduce",
  exchange: "exchange", optimizer: "optimizer", gather: "gather", backup: "backup", recovery: "recovery", idle: "idle",
};

const CAUSES = {
  productive: ["productive", "--backward"], initialisation: ["starting", "--held_out"], data_wait: ["data", "--data"],
  checkpoint: ["checkpoint", "--backup"], wasted_progress: ["wasted", "--recovery"], recovery_detect: ["detect", "--reduce"],
  recovery_agree: ["agree", "--gather"], recovery_plan: ["plan", "--optimizer"], recovery_move: ["move", "--exchange"],
  recovery_redo: ["redo", "--bad"], join: ["join", "--mark"], paused: ["paused", "--wait"],
};
export const cause = name => CAUSES[name] || [name, "--soft"];

const resolved = new Map(), probe = make("i", {hidden: ""});

/** What a custom property of the style sheet is in the present theme, as rgb(...). */
export function colour(name) {
  if (!resolved.has(name)) {
    if (!probe.isConnected) document.body.append(probe);
    probe.style.color = `var(${name})`;
    resolved.set(name, getComputedStyle(probe).color);
  }
  return resolved.get(name);
}

/** After a change of theme. */
export const forgetColours = () => resolved.clear();
