// The page: asks for the run once a second, and shows what has changed.

import {Charts} from "./charts.js";
import {Grid} from "./grid.js";
import {Timeline} from "./timeline.js";
import {at, cause, clock, count, dealt, duration, forgetColours, known, layers, make, percent, plural, say, seconds} from "./words.js";

const LIVE = 1000, OVER = 5000, HIDDEN = 5000;  // milliseconds between two looks
const CHIPS = 32;  // workers of a stage from which on a plan shows only those that change

const plans = new Map(), tags = new Map();
let shown = null, timeline = null, chosen = null, follows = true;

const grid = new Grid(worker => lanes.choose(worker));
const lanes = new Timeline(worker => grid.choose(worker, false));
const charts = new Charts();

/** The answer, or null where nothing is new. */
async function ask(path) {
  const response = await fetch(path, {headers: tags.has(path) ? {"If-None-Match": tags.get(path)} : {}, cache: "no-store"});
  if (response.status === 304) return null;
  if (!response.ok) throw new Error(`the server answers ${response.status}`);
  const body = await response.json();
  if (response.headers.get("etag")) tags.set(path, response.headers.get("etag"));
  return body;
}

async function plan(generation) {
  if (!plans.has(generation)) {
    const found = await ask(`api/plan/${generation}`);
    if (found) plans.set(generation, found);
  }
  return plans.get(generation);
}

async function look() {
  try {
    const answer = await ask("api/run");
    if (answer) {
      // another run's, of which nothing that is here is true
      if (shown && shown.server !== answer.server) return location.reload();
      shown = {...answer, skew: Date.now() / 1000 - answer.now};
      if (answer.timeline !== (timeline && timeline.version)) {
        const spans = await ask("api/timeline");
        if (spans) timeline = {...spans, version: answer.timeline};
        else if (timeline) timeline.version = answer.timeline;
      }
      if (timeline) await Promise.all([...new Set(timeline.steps.map(step => step.generation))]
        .filter(generation => answer.plans.includes(generation)).map(plan));
      show();
    }
    notice(shown.run.problem && `The run's record cannot be read: ${shown.run.problem}`);
  } catch (error) {
    notice(`No contact with reknit dashboard (${error.message}); trying again.`);
  }
  if (shown) elapsed();
  setTimeout(look, document.hidden ? HIDDEN : shown && shown.run.over ? OVER : LIVE);
}

function notice(text) {
  at("problem").hidden = !text;
  say(at("problem"), text || "");
}

function show() {
  figures(shown.run);
  grid.show(shown.plan, shown.shares);
  if (timeline) lanes.show(timeline, shown.events, plans, !shown.run.over);
  if (lanes.worker === null && grid.chosen !== null) lanes.choose(grid.chosen);
  badput(shown.run);  // first, since the charts fill what it leaves
  charts.show(shown.charts, shown.events);
  events();
}

function figures(run) {
  document.title = `${run.name}: ${run.state}`;
  say(at("name"), run.name);
  say(at("state"), run.state);
  at("state").className = `pill ${run.state}`;
  say(at("detail"), run.detail);
  say(at("step"), known(run.steps) ? `${count(run.step)} / ${count(run.steps)}` : count(run.step));
  const done = run.steps ? run.step / run.steps : 0;
  at("progress").firstElementChild.style.width = percent(done);
  at("progress").setAttribute("aria-valuemax", run.steps || 0);
  at("progress").setAttribute("aria-valuenow", run.step);
  say(at("loss"), known(run.loss) ? run.loss.toFixed(4) : "-");
  const held = shown.charts.held_out.y.at(-1);
  say(at("loss-note"), known(held) ? `held-out ${held.toFixed(4)}` : "");
  say(at("speed"), known(run.tokens_per_second) ? count(Math.round(run.tokens_per_second)) : "-");
  say(at("speed-note"), known(run.step_seconds) ? `${seconds(run.step_seconds)} a step` : "");
  say(at("workers"), String(run.workers || "-"));
  say(at("workers-note"), run.stages ? `in ${plural(run.stages, "stage")}` : "");
  say(at("goodput"), known(run.goodput) ? percent(run.goodput) : "-");
  say(at("goodput-note"), worst(run.badput));
  elapsed();
}

function worst(badput) {
  const [name, lost] = Object.entries(badput).filter(([name]) => name !== "productive").sort((a, b) => b[1] - a[1])[0] || [];
  return name ? `${cause(name)[0]} cost ${seconds(lost)}` : "";
}

function elapsed() {
  const run = shown.run;
  const passed = run.over || run.state === "silent" || !known(run.started) ? run.elapsed : Date.now() / 1000 - shown.skew - run.started;
  say(at("elapsed"), known(run.started) ? duration(passed) : "-");
  const left = run.steps && run.step_seconds && run.state === "running" ? (run.steps - run.step) * run.step_seconds : null;
  say(at("elapsed-note"), known(left) ? `about ${duration(left)} left` : run.device ? `on ${run.device}` : "");
}

function badput(run) {
  const parts = Object.entries(run.badput).sort((a, b) => b[1] - a[1]), sum = parts.reduce((all, [, each]) => all + each, 0);
  at("badput").replaceChildren(...parts.map(([name, each]) =>
    make("i", {style: {background: `var(${cause(name)[1]})`, width: percent(each / sum, 3)}})));
  at("badput-legend").replaceChildren(...parts.filter(([, each]) => each / sum >= 0.001).map(([name, each]) => make("li", {},
    make("i", {class: "swatch", style: {background: `var(${cause(name)[1]})`}}), `${cause(name)[0]} ${percent(each / sum)}`)));
}

// The event log, and the plan before and after the chosen event.

function listed() {
  return shown.events.filter(event => event.tone !== "quiet" || at("quiet").checked);
}

function events() {
  const list = at("events"), all = listed();
  const shape = JSON.stringify([all.length, all.length && all.at(-1).number, all.length && all[0].number]);
  say(at("events-note"), shown.events.length ? "" : "none yet");
  if (follows || !all.some(event => event.number === chosen)) {
    // what somebody wants to see first: the newest change of plan
    const change = [...all].reverse().find(event => event.before !== event.after) || all.at(-1);
    chosen = change ? change.number : null;
  }
  if (list.dataset.shape !== shape) {
    const focused = list.contains(document.activeElement), bottom = list.scrollHeight - list.scrollTop - list.clientHeight < 30;
    list.dataset.shape = shape;
    renew(list, all);
    if (bottom || follows) list.scrollTop = list.scrollHeight;
    mark(focused);
  } else mark(false);
  compare();
}

/** Rows that stay are left where they are: one that is taken out under somebody's finger loses the click. */
function renew(list, all) {
  const wanted = new Set(all.map(event => event.number));
  for (const row of [...list.children]) if (!wanted.has(Number(row.dataset.number))) row.remove();
  let place = list.firstElementChild;
  for (const event of all) {
    if (place && Number(place.dataset.number) === event.number) place = place.nextElementSibling;
    else list.insertBefore(item(event), place);
  }
}

function item(event) {
  return make("li", {class: event.tone, role: "option", tabindex: -1, "data-number": event.number, id: `event-${event.number}`},
    make("i", {class: "dot", "aria-hidden": "true"}), make("span", {class: "time"}, clock(event.time)),
    make("span", {class: "at"}, known(event.step) ? `step ${event.step}` : ""), make("span", {class: "text"}, event.text));
}

function mark(focus) {
  for (const each of at("events").children) {
    const is = Number(each.dataset.number) === chosen;
    each.setAttribute("aria-selected", is);
    each.tabIndex = is ? 0 : -1;
    if (is && focus) each.focus();
  }
}

function choose(number, focus) {
  chosen = number;
  follows = false;
  mark(focus);
  compare();
  const event = shown.events.find(each => each.number === number);
  if (known(event.step)) lanes.open(event.step);
}

at("events").addEventListener("click", event => {
  const row = event.target.closest("li");
  if (row) choose(Number(row.dataset.number), true);
});
at("events").addEventListener("keydown", event => {
  const rows = [...at("events").children], here = rows.findIndex(row => Number(row.dataset.number) === chosen);
  const next = {ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: rows.length - 1}[event.key];
  if (next === undefined || !rows[next]) return;
  event.preventDefault();
  choose(Number(rows[next].dataset.number), true);
});
at("quiet").addEventListener("change", () => shown && events());

async function compare() {
  const event = shown.events.find(each => each.number === chosen), place = at("plans");
  if (!event) {
    place.dataset.shape = "";
    place.replaceChildren(make("div", {class: "empty"}, "Nothing has happened yet."));
    return say(at("plans-note"), "");
  }
  const shape = JSON.stringify([event.number, event.before, event.after]);
  if (place.dataset.shape === shape) return;
  place.dataset.shape = shape;
  let before, after;
  try {
    [before, after] = await Promise.all([event.before, event.after].map(each => known(each) ? plan(each) : null));
  } catch {
    if (place.dataset.shape === shape) place.dataset.shape = "";  // the next look asks again
    return;
  }
  if (place.dataset.shape !== shape) return;  // another one was chosen meanwhile
  say(at("plans-note"), known(event.step) ? `step ${event.step}` : "");
  if (!before && !after) return place.replaceChildren(make("div", {class: "empty"}, "No plan is on record around this event."));
  if (!before || !after || before.generation === after.generation) {
    const only = after || before;
    const title = before && after ? "The plan stayed the same" : before ? "Plan before" : "Plan after";
    return place.replaceChildren(drawn(title, only, null));
  }
  place.replaceChildren(drawn("Before", before, after, "gone"), drawn("After", after, before, "new"));
}

/** A plan's stages; workers that the `other` one does not have, or has otherwise, stand out. */
function drawn(title, plan, other, missing) {
  const mine = dealt(plan), theirs = other ? dealt(other) : null;
  const home = new Map(other ? other.stages.flatMap((stage, k) => stage.workers.map(worker => [worker, k])) : []);
  const rows = plan.stages.map((stage, k) => {
    const chips = stage.workers.map(worker => {
      const batches = mine.get(worker), change = !theirs ? "" : !theirs.has(worker) ? missing
        : home.get(worker) !== k || String(theirs.get(worker)) !== String(batches) ? "changed" : "";
      return [change, make("span", {class: `chip ${change}`, title: `worker ${worker}: micro-batches ${batches.join(", ") || "none"}`},
        `${worker} `, make("span", {class: "soft"}, `\u00d7${batches.length}`))];
    });
    const few = chips.length > CHIPS ? outstanding(chips, missing) : chips, rest = chips.length - few.length;
    return make("div", {class: "row"}, make("div", {class: "name"}, make("b", {}, `Stage ${k}`), make("span", {class: "soft"}, layers(stage))),
      make("div", {class: "chips"}, ...few.map(([, chip]) => chip), rest ? make("span", {class: "soft"}, `and ${rest} more`) : null));
  });
  return make("div", {class: "plan"}, make("h3", {}, `${title} `,
    make("span", {class: "soft"}, `generation ${plan.generation}, ${plural(mine.size, "worker")}; \u00d7 micro-batches` +
      (plan.strategy ? `; ${plan.strategy}` : ""))), ...rows);
}

/** Of many workers those that went or came, and some of the others, those that changed first. */
function outstanding(chips, missing) {
  const moved = chips.filter(([change]) => change && change === missing);
  const others = [...chips.filter(([change]) => change === "changed"), ...chips.filter(([change]) => !change)];
  return [...moved, ...others.slice(0, Math.max(0, CHIPS / 2 - moved.length))];
}

// Light and dark: as the system has it, or as somebody wants it.

const dark = matchMedia("(prefers-color-scheme: dark)");
function theme() {
  document.documentElement.dataset.theme = at("theme").value;
  forgetColours();
  lanes.draw();
  charts.again();
}
try { at("theme").value = localStorage.getItem("reknit-theme") || "auto"; } catch { /* storage is off: the system's it is */ }
at("theme").addEventListener("change", () => {
  try { localStorage.setItem("reknit-theme", at("theme").value); } catch { /* for this time alone */ }
  theme();
});
dark.addEventListener("change", theme);
theme();
look();
