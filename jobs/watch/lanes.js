// The lanes of the timeline: a canvas with a row for each worker and a rectangle for each span.

import {colour, seconds} from "./words.js";

export const LEFT = 62;
const TOP = 34, BOTTOM = 6, HEIGHT = 540;
const SHOWN = 3;  // steps that are seen at once unless somebody zooms

export class Lanes {
  constructor(canvas) {
    this.canvas = canvas;
    this.shown = [];  // steps, ascending
    this.rows = [];  // {worker, stage}, from top to bottom
    this.group = "last";  // or the step of an event
    this.view = null;  // [from, to] in seconds since 1970, or null: what fits
    this.span = null;
    this.worker = null;
  }

  /** [from, to] that is seen. */
  range() {
    if (this.view) return this.view;
    const shown = this.shown.filter(step => step.ended > step.began);
    if (!shown.length) return [0, 1];
    let part = shown.slice(-SHOWN);
    if (this.group !== "last") part = shown.filter(step => Math.abs(step.step - Number(this.group)) <= 1);
    else if (this.running && shown.length > SHOWN) part = shown.slice(-SHOWN - 1, -1);  // the newest may not be whole
    if (!part.length) part = shown;
    const from = part[0].began, to = Math.max(...part.map(step => step.ended));
    return [from - (to - from) * 0.005, to + (to - from) * 0.005];
  }

  time(x) { const [from, to] = this.range(); return from + (x - LEFT) / (this.width - LEFT) * (to - from); }
  x(time) { const [from, to] = this.range(); return LEFT + (time - from) / (to - from) * (this.width - LEFT); }

  draw() {
    const canvas = this.canvas, scale = window.devicePixelRatio || 1, rows = this.rows.length;
    this.width = canvas.parentElement.clientWidth;
    this.tall = rows ? Math.min(26, Math.max(3, Math.floor(HEIGHT / rows))) : 0;
    const gaps = new Set(this.rows.map(row => row.stage)).size;
    const height = rows ? TOP + rows * this.tall + gaps * 6 + BOTTOM : 90;
    if (canvas.height !== Math.round(height * scale) || canvas.width !== Math.round(this.width * scale)) {
      canvas.width = Math.round(this.width * scale);
      canvas.height = Math.round(height * scale);
      canvas.style.height = height + "px";
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, this.width, height);
    pen.font = "12px system-ui, sans-serif";
    pen.textBaseline = "middle";
    const ink = colour("--ink"), soft = colour("--soft"), line = colour("--line");
    if (!rows) {
      pen.fillStyle = soft;
      pen.textAlign = "center";
      pen.fillText("No step is on record with its times.", this.width / 2, height / 2);
      pen.textAlign = "left";
      return;
    }
    const paints = this.kinds.map(kind => colour("--" + kind));
    let y = TOP, stage = this.rows[0].stage;
    pen.fillStyle = colour("--idle");
    for (const row of this.rows) {
      if (row.stage !== stage) { y += 6; stage = row.stage; }
      row.y = y;
      pen.fillRect(LEFT, y, this.width - LEFT, this.tall - (this.tall > 6 ? 3 : this.tall > 4 ? 1 : 0));
      y += this.tall;
    }
    pen.save();
    pen.beginPath();
    pen.rect(LEFT, 0, this.width - LEFT, height);
    pen.clip();
    this.spans(pen, paints);
    this.axis(pen, y, ink, soft, line);
    this.happened(pen, y);
    if (this.span) this.outline(pen, ink);
    pen.restore();
    this.names(pen, ink, soft);
  }

  spans(pen, paints) {
    const [from, to] = this.range(), wide = (this.width - LEFT) / (to - from), deep = this.tall - (this.tall > 6 ? 3 : this.tall > 4 ? 1 : 0);
    for (const step of this.shown) {
      if (step.ended < from || step.began > to) continue;
      for (const row of this.rows) {
        const flat = step.rows.get(row.worker);
        if (!flat) continue;
        for (let i = 0; i < flat.length; i += 4) {
          const left = LEFT + (step.began - from + flat[i + 2] / 1e6) * wide, right = left + flat[i + 3] / 1e6 * wide;
          if (right < LEFT || left > this.width) continue;
          pen.fillStyle = paints[flat[i]];
          pen.fillRect(left, row.y, Math.max(right - left - (right - left > 3 ? 0.7 : 0), 0.4), deep);
          if (deep > 13 && right - left > 22 && flat[i + 1] >= 0) {
            pen.fillStyle = "#fff";
            pen.textAlign = "center";
            pen.fillText(String(flat[i + 1]), (Math.max(left, LEFT) + Math.min(right, this.width)) / 2, row.y + deep / 2 + 0.5);
            pen.textAlign = "left";
          }
        }
      }
    }
  }

  axis(pen, bottom, ink, soft, line) {
    let end = -1;
    for (const step of this.shown) {
      const left = this.x(step.began), right = this.x(step.ended);
      if (right < LEFT || left > this.width) continue;
      pen.fillStyle = line;
      pen.fillRect(Math.round(left), 4, 1, bottom - 4);
      const at = Math.max(left, LEFT) + 5, room = Math.min(right, this.width) - at;
      const name = `step ${step.step}`, took = seconds(step.ended - step.began);
      const wide = pen.measureText(name).width;
      if (at < end || room < wide) continue;
      pen.fillStyle = ink;
      pen.fillText(name, at, 11);
      end = at + wide;
      pen.fillStyle = soft;
      if (room >= pen.measureText(took).width) pen.fillText(took, at, 25);
    }
  }

  happened(pen, bottom) {
    for (const event of this.events) {
      if (event.tone === "quiet" || event.kind === "RunStarted" || event.kind === "RunFinished") continue;
      const x = this.x(event.time);
      if (x < LEFT || x > this.width) continue;
      const paint = colour(event.tone === "bad" ? "--bad" : event.tone === "good" ? "--good" : "--mark");
      pen.strokeStyle = pen.fillStyle = paint;
      pen.setLineDash([3, 3]);
      pen.beginPath();
      pen.moveTo(x, TOP - 4);
      pen.lineTo(x, bottom);
      pen.stroke();
      pen.setLineDash([]);
      pen.beginPath();
      pen.arc(x, TOP - 5, 3.5, 0, 7);
      pen.fill();
    }
  }

  outline(pen, ink) {
    const row = this.rows.find(each => each.worker === this.span.worker);
    if (!row) return;
    const left = this.x(this.span.from), right = this.x(this.span.to);
    pen.strokeStyle = ink;
    pen.lineWidth = 2;
    pen.strokeRect(left, row.y - 1, Math.max(3, right - left), this.tall > 6 ? this.tall - 1 : this.tall);
    pen.lineWidth = 1;
  }

  names(pen, ink, soft) {
    let stage;
    for (const row of this.rows) {
      const first = row.stage !== stage;
      stage = row.stage;
      pen.fillStyle = row.worker === this.worker ? ink : soft;
      if (this.tall >= 12) {
        pen.font = (row.worker === this.worker ? "600 " : "") + "12px system-ui, sans-serif";
        pen.textAlign = "right";
        pen.fillText(String(row.worker), LEFT - 8, row.y + (this.tall - 3) / 2);
        pen.textAlign = "left";
        pen.font = "11px system-ui, sans-serif";
        pen.fillStyle = soft;
        if (first) pen.fillText(stage === null ? "left" : `stage ${stage}`, 0, row.y + (this.tall - 3) / 2);
      } else if (first) {
        pen.font = "11px system-ui, sans-serif";
        pen.fillStyle = soft;
        pen.fillText(stage === null ? "left" : `stage ${stage}`, 0, row.y + 6);
      }
    }
    if (this.tall < 12 && this.worker !== null) {
      const row = this.rows.find(each => each.worker === this.worker);
      if (!row) return;
      pen.fillStyle = ink;
      pen.textAlign = "right";
      pen.fillText("\u25b8", LEFT - 2, row.y + this.tall / 2);
      pen.textAlign = "left";
    }
  }
}
