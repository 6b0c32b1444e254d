// The timeline: which steps it shows, and what a person does with it.

import {Lanes, LEFT} from "./lanes.js";
import {at, clock, KIND_NAMES, make, say, seconds} from "./words.js";

export class Timeline extends Lanes {
  constructor(chosen) {
    super(at("lanes"));
    this.onChoice = chosen;
    this.steps = [];
    this.listen();
  }

  listen() {
    const canvas = this.canvas;
    at("moment").addEventListener("change", () => this.open(at("moment").value));
    at("fit").addEventListener("click", () => this.look(null));
    at("closer").addEventListener("click", () => this.zoom(0.5));
    at("wider").addEventListener("click", () => this.zoom(2));
    at("earlier").addEventListener("click", () => this.pan(-0.3));
    at("later").addEventListener("click", () => this.pan(0.3));
    canvas.addEventListener("keydown", event => this.key(event));
    canvas.addEventListener("pointermove", event => this.hover(event));
    canvas.addEventListener("pointerleave", () => { at("tip").hidden = true; this.drag = null; });
    canvas.addEventListener("pointerdown", event => { this.drag = {x: event.offsetX, view: this.range(), moved: false}; });
    canvas.addEventListener("pointerup", event => {
      if (this.drag && !this.drag.moved) this.pick(this.hit(event.offsetX, event.offsetY));
      this.drag = null;
    });
    canvas.addEventListener("wheel", event => {
      if (!event.ctrlKey && !event.shiftKey) return;  // the page scrolls as ever
      event.preventDefault();
      this.zoom(event.deltaY + event.deltaX > 0 ? 1.25 : 0.8, this.time(event.offsetX));
    }, {passive: false});
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
  }

  /** Takes what is on record; `events` and `plans` (by generation) name what is seen. */
  show(timeline, events, plans, running) {
    this.kinds = timeline.kinds;
    this.steps = timeline.steps.map(read);
    this.events = events;
    this.plans = plans;
    this.running = running;
    this.groups();
    this.legend();
    this.arrange();
  }

  /** Steps in a row belong together; those around an event are called by it. */
  groups() {
    const runs = [];
    for (const step of this.steps) {
      const last = runs.at(-1);
      if (last && step.step === last.at(-1).step + 1) last.push(step); else runs.push([step]);
    }
    this.runs = new Map();
    if (runs.length) this.runs.set("last", runs.at(-1));
    const options = [["last", runs.length ? `the last ${runs.at(-1).length}` : "none yet"]];
    const wanted = new Set(["Recovered", "WorkerJoined", "WorkerLeft", "Rebalanced", "Resumed", "ControllerRestarted", "StepRepeated"]);
    for (const event of [...this.events].reverse()) {
      const run = wanted.has(event.kind) && runs.find(each => each.some(step => step.step === event.step));
      if (!run || this.runs.has(String(event.step))) continue;
      this.runs.set(String(event.step), run.filter(step => Math.abs(step.step - event.step) <= 2));
      options.push([String(event.step), `${event.step}: ${brief(event)}`]);
    }
    const select = at("moment"), shape = JSON.stringify(options);
    if (shape !== this.shape) {
      this.shape = shape;
      select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
    }
    if (!this.runs.has(this.group)) this.group = "last";
    select.value = this.group;
  }

  /** Shows the steps around an event, or "last"; false where they are not on record. */
  open(group) {
    if (!this.runs || !this.runs.has(String(group))) return false;
    this.group = String(group);
    at("moment").value = this.group;
    this.view = this.span = null;
    this.arrange();
    return true;
  }

  arrange() {
    this.shown = (this.runs && this.runs.get(this.group)) || [];
    const seen = new Set(this.shown.flatMap(step => [...step.rows.keys()]));
    const newest = this.shown.at(-1);
    // around an event as the plan before it has them, then newcomers; of the last steps as the newest plan has them
    const steps = this.group === "last" ? this.shown.slice(-1) : this.shown;
    const orders = steps.map(step => this.plans.get(step.generation)).filter(Boolean);
    this.rows = [];
    const stages = Math.max(0, ...orders.map(plan => plan.stages.length));
    for (let k = 0; k < stages; k++) for (const plan of orders) for (const worker of (plan.stages[k] || {workers: []}).workers) {
      if (seen.has(worker) && !this.rows.some(row => row.worker === worker)) this.rows.push({worker, stage: k});
    }
    for (const worker of [...seen].sort((a, b) => a - b)) {
      if (!this.rows.some(row => row.worker === worker)) this.rows.push({worker, stage: null});
    }
    if (this.view && newest && (this.view[1] < this.shown[0].began || this.view[0] > newest.ended)) this.view = null;  // gone by
    if (this.span && !this.shown.some(step => step.step === this.span.step)) this.span = null;
    this.draw();
    if (!newest) say(at("span"), "");
    else if (!this.span) say(at("span"), `Steps ${this.shown[0].step} to ${newest.step}` +
      (newest.dropped ? `; ${newest.dropped} spans found no room` : "") + ". Point at a span, or use the arrow keys.");
  }

  look(view) { this.view = view; this.draw(); }
  zoom(factor, around) {
    const [from, to] = this.range(), middle = around ?? (this.span ? this.span.from : (from + to) / 2);
    const width = Math.min(Math.max((to - from) * factor, 1e-5), 3600);
    const share = Math.min(1, Math.max(0, (middle - from) / (to - from)));
    this.look([middle - width * share, middle + width * (1 - share)]);
  }
  pan(share) { const [from, to] = this.range(); this.look([from + (to - from) * share, to + (to - from) * share]); }

  hit(x, y) {
    const row = this.rows.find(each => y >= each.y && y < each.y + this.tall);
    if (!row || x < LEFT) return null;
    const time = this.time(x), near = 2 * (this.time(1) - this.time(0));
    let best = null, least = near;
    for (const span of this.spansOf(row.worker)) {
      const away = time < span.from ? span.from - time : time > span.to ? time - span.to : 0;
      if (away <= least) [best, least] = [span, away];
    }
    return best;
  }

  spansOf(worker) {
    const found = [];
    for (const step of this.shown) {
      const flat = step.rows.get(worker) || [];
      for (let i = 0; i < flat.length; i += 4) {
        const from = step.began + flat[i + 2] / 1e6;
        found.push({worker, step: step.step, kind: this.kinds[flat[i]], batch: flat[i + 1], from, to: from + flat[i + 3] / 1e6});
      }
    }
    return found;
  }

  hover(event) {
    if (this.drag) {
      const moved = event.offsetX - this.drag.x, [from, to] = this.drag.view;
      if (this.drag.moved || Math.abs(moved) > 3) {
        const by = -moved / (this.width - LEFT) * (to - from);
        this.drag.moved = true;
        this.look([from + by, to + by]);
      }
      return;
    }
    const span = this.hit(event.offsetX, event.offsetY), tip = at("tip");
    tip.hidden = !span;
    if (!span) return;
    say(tip, words(span));
    tip.style.left = Math.max(0, Math.min(event.offsetX + 12, this.width - tip.offsetWidth)) + "px";
    tip.style.top = event.offsetY + 16 + "px";
  }

  pick(span) {
    if (!span) return;
    this.span = span;
    this.worker = span.worker;
    const [from, to] = this.range();
    if (span.to < from || span.from > to) this.view = [span.from - (to - from) * 0.3, span.from + (to - from) * 0.7];
    say(at("span"), words(span) + `, ${clock(span.from)}`);
    this.draw();
    this.onChoice(span.worker);
  }

  choose(worker) {
    this.worker = worker;
    if (this.span && this.span.worker !== worker) this.span = null;
    this.draw();
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.rows.length) return;
    const action = {
      "+": () => this.zoom(0.5), "=": () => this.zoom(0.5), "-": () => this.zoom(2), f: () => this.look(null),
      ArrowLeft: () => event.shiftKey ? this.pan(-0.3) : this.go(-1), ArrowRight: () => event.shiftKey ? this.pan(0.3) : this.go(1),
      ArrowUp: () => this.change(-1), ArrowDown: () => this.change(1),
      Home: () => this.pick(this.spansOf(this.row().worker)[0]), End: () => this.pick(this.spansOf(this.row().worker).at(-1)),
    }[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }

  row() { return this.rows.find(row => row.worker === this.worker) || this.rows[0]; }

  go(by) {
    const spans = this.spansOf(this.row().worker), [from] = this.range();
    if (!this.span) return this.pick(spans.find(span => span.to >= from) || spans[0]);
    const here = spans.findIndex(span => span.from === this.span.from && span.kind === this.span.kind);
    this.pick(spans[Math.min(spans.length - 1, Math.max(0, here + by))]);
  }

  change(by) {
    const next = this.rows[Math.min(this.rows.length - 1, Math.max(0, this.rows.indexOf(this.row()) + by))];
    const time = this.span ? this.span.from : this.range()[0], spans = this.spansOf(next.worker);
    this.pick(spans.find(span => span.to >= time) || spans.at(-1));
  }

  legend() {
    const seen = new Set();
    for (const step of this.steps) for (const flat of step.rows.values()) for (let i = 0; i < flat.length; i += 4) seen.add(flat[i]);
    const shape = [...seen].sort().join();
    if (shape === this.legended) return;
    this.legended = shape;
    const kinds = this.kinds.filter((_, i) => seen.has(i));
    at("legend").replaceChildren(...kinds.map(kind => make("li", {},
      make("i", {class: "swatch", style: {background: `var(--${kind})`}}), KIND_NAMES[kind] || kind)));
  }
}

/** A step of the record with its end, and the spans by worker. */
function read(line) {
  let ended = 0;
  const rows = new Map(Object.entries(line.workers).map(([worker, flat]) => [Number(worker), flat]));
  for (const flat of rows.values()) for (let i = 0; i < flat.length; i += 4) ended = Math.max(ended, flat[i + 2] + flat[i + 3]);
  return {step: line.step, generation: line.generation, began: line.began, ended: line.began + ended / 1e6, dropped: line.dropped, rows};
}

const words = span => `worker ${span.worker}, step ${span.step}: ${KIND_NAMES[span.kind] || span.kind}` +
  (span.batch >= 0 ? ` of micro-batch ${span.batch}` : "") + `, ${seconds(span.to - span.from)}`;

const brief = event => ({
  Recovered: event.workers.length ? `worker ${event.workers.join(", ")} lost` : "recovered",
  WorkerJoined: `worker ${event.workers[0]} joined`, WorkerLeft: `worker ${event.workers[0]} left`,
  Rebalanced: "work divided anew", Resumed: "resumed", ControllerRestarted: "a new controller", StepRepeated: "repeated",
}[event.kind]);
