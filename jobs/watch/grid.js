// The grid of stages and workers, and the facts of the chosen one.

import {amount, at, count, dealt, KIND_NAMES, layers, make, percent, plural, ranges, say} from "./words.js";

const MANY = 40;  // workers from which on a cell shows its number and bar alone

export class Grid {
  constructor(chosen) {
    this.chosen = null;  // a worker
    this.onChoice = chosen;
    this.cells = new Map();
    this.shape = "";
    at("grid").addEventListener("click", event => {
      const cell = event.target.closest("[data-worker]");
      if (cell) this.choose(Number(cell.dataset.worker), true);
    });
    at("grid").addEventListener("keydown", event => this.key(event));
    at("grid").addEventListener("focusin", event => {
      const cell = event.target.closest("[data-worker]");
      if (cell && Number(cell.dataset.worker) !== this.chosen) this.choose(Number(cell.dataset.worker), false);
    });
  }

  /** `plan` may be null; `shares` maps a worker to its shares of the last step by kind. */
  show(plan, shares) {
    this.plan = plan;
    this.shares = shares;
    const grid = at("grid");
    if (!plan) {
      this.shape = "";
      this.cells.clear();
      grid.replaceChildren(make("div", {class: "empty"}, "No plan yet: workers are being started."));
      at("worker").replaceChildren();
      say(at("grid-note"), "");
      return;
    }
    const shape = JSON.stringify([plan.generation, plan.stages, plan.assignment]);
    if (shape !== this.shape) this.build(plan, shape);
    for (const [worker, cell] of this.cells) fill(cell.querySelector(".bar"), shares[worker]);
    this.facts();
  }

  build(plan, shape) {
    const focused = document.activeElement && document.activeElement.closest("#grid");
    const batches = dealt(plan), workers = [...batches.keys()];
    this.shape = shape;
    this.batches = batches;
    this.cells.clear();
    if (!workers.includes(this.chosen)) this.chosen = Math.min(...workers);
    const rows = plan.stages.map((stage, k) => {
      const cells = stage.workers.map(worker => this.cell(worker, stage, k, batches.get(worker)));
      const name = make("div", {class: "name", role: "rowheader"}, make("b", {}, `Stage ${k}`),
        make("span", {class: "soft"}, layers(stage)));
      return make("div", {class: "row", role: "row"}, name, make("div", {class: "cells", role: "presentation"}, ...cells));
    });
    at("grid").replaceChildren(...rows);
    at("grid").classList.toggle("many", workers.length >= MANY);
    at("grid").setAttribute("aria-rowcount", plan.stages.length);
    say(at("grid-note"), `generation ${plan.generation}: ${plural(workers.length, "worker")}, ` +
      `${count(plan.assignment[0].length)} micro-batches a step` + (plan.strategy ? `; ${plan.strategy}` : ""));
    this.mark();
    if (focused) this.cells.get(this.chosen).focus();
  }

  cell(worker, stage, k, micro_batches) {
    const cell = make("div", {
      class: "cell", role: "gridcell", "data-worker": worker, tabindex: -1,
      "aria-label": `worker ${worker}, stage ${k}, ${layers(stage)}, micro-batches ${ranges(micro_batches) || "none"}`,
    }, make("b", {}, String(worker)),
      make("span", {class: "soft"}, micro_batches.length ? `batches ${ranges(micro_batches)}` : "no batches"),
      make("div", {class: "bar", "aria-hidden": "true"}));
    this.cells.set(worker, cell);
    return cell;
  }

  choose(worker, focus) {
    if (!this.cells.has(worker)) return;
    this.chosen = worker;
    this.mark();
    if (focus) this.cells.get(worker).focus();
    this.facts();
    this.onChoice(worker);
  }

  mark() {
    for (const [worker, cell] of this.cells) {
      cell.setAttribute("aria-selected", worker === this.chosen);
      cell.tabIndex = worker === this.chosen ? 0 : -1;
    }
  }

  key(event) {
    const rows = this.plan ? this.plan.stages.map(stage => stage.workers) : [];
    const k = rows.findIndex(row => row.includes(this.chosen));
    if (k < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
    const i = rows[k].indexOf(this.chosen), all = rows.flat();
    // a stage may take several lines: up and down go by what is seen
    const move = {
      ArrowLeft: () => all[Math.max(0, all.indexOf(this.chosen) - 1)],
      ArrowRight: () => all[Math.min(all.length - 1, all.indexOf(this.chosen) + 1)],
      ArrowUp: () => this.beside(-1), ArrowDown: () => this.beside(1),
      Home: () => rows[k][0], End: () => rows[k].at(-1),
    }[event.key];
    if (!move) return;
    event.preventDefault();
    this.choose(move() ?? rows[k][i], true);
  }

  /** The nearest worker in the line above or below. */
  beside(direction) {
    const here = this.cells.get(this.chosen).getBoundingClientRect();
    let best = null, least = Infinity;
    for (const [worker, cell] of this.cells) {
      const there = cell.getBoundingClientRect();
      const down = (there.top - here.top) * direction;
      const distance = down * 1000 + Math.abs(there.left - here.left);
      if (down > 2 && distance < least) [best, least] = [worker, distance];
    }
    return best;
  }

  facts() {
    const plan = this.plan, worker = this.chosen, panel = at("worker");
    const k = plan.stages.findIndex(stage => stage.workers.includes(worker));
    if (k < 0) return panel.replaceChildren();
    const shard = plan.shards[worker] || {owned: 0, kept: 0, backups: []}, mine = this.batches.get(worker);
    const rows = [
      ["stage", `${k}, ${layers(plan.stages[k])}`], ["micro-batches", `${mine.length}: ${ranges(mine) || "none"}`],
      ["owns", `${amount(shard.owned)} parameters`], ["backed up by", shard.backups.length ? ranges(shard.backups) : "nobody"],
      ["keeps", `${amount(shard.kept)} of others`],
    ];
    const list = make("dl", {}, ...rows.flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)]));
    const mix = this.shares[worker];
    const text = JSON.stringify([rows, mix ? Object.entries(mix).map(([k, v]) => [k, percent(v, 0)]) : 0]);
    if (text === this.told) return;
    this.told = text;
    const parts = mix ? Object.entries(mix).filter(([, share]) => share >= 0.005).sort((a, b) => b[1] - a[1]) : [];
    const shares = make("dl", {class: "shares"}, ...parts.flatMap(([kind, share]) => [
      make("i", {class: "swatch", style: {background: `var(--${kind})`}}), make("dt", {}, KIND_NAMES[kind] || kind),
      make("dd", {}, percent(share, 0))]));
    panel.replaceChildren(make("div", {}, make("h3", {}, `Worker ${count(worker)}`), list),
      make("div", {}, make("h3", {class: "share"}, mix ? "Share of the last step" : "No step of it is on record yet"), shares));
  }
}

function fill(bar, mix) {
  const parts = mix ? Object.keys(KIND_NAMES).filter(kind => kind !== "idle" && mix[kind]).map(kind => [kind, mix[kind]]) : [];
  while (bar.children.length < parts.length) bar.append(document.createElement("i"));
  while (bar.children.length > parts.length) bar.lastChild.remove();
  parts.forEach(([kind, share], i) => {
    bar.children[i].style.background = `var(--${kind})`;
    bar.children[i].style.width = percent(share, 2);
  });
}
