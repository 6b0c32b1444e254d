// The curves, drawn by plotly, which the Python package of that name ships.

import {at, colour, duration, make} from "./words.js";

const CONFIG = {displayModeBar: false, responsive: true, scrollZoom: false};

export class Charts {
  /** `charts` as /api/run has them; `events` mark when the membership changed. */
  show(charts, events) {
    this.drawn = [charts, events];
    const paint = {ink: colour("--ink"), soft: colour("--soft"), line: colour("--line"), mark: colour("--mark"),
      good: colour("--backward"), bad: colour("--bad"), warm: colour("--reduce"), card: colour("--card")};
    const changes = events.filter(event => ["Recovered", "WorkerJoined", "WorkerLeft", "Rebalanced"].includes(event.kind) && event.step);
    const marks = changes.slice(-40).map(event => ({type: "line", xref: "x", yref: "paper", x0: event.step, x1: event.step, y0: 0, y1: 1,
      line: {color: event.kind === "Recovered" ? paint.bad : paint.soft, width: 1, dash: "dot"}}));
    const many = charts.loss.x.length > 1;
    const curve = (data, name, color, format) => ({x: data.x, y: data.y, name, type: "scatter", mode: many ? "lines" : "markers",
      line: {color, width: 1.75}, marker: {color}, hovertemplate: `%{y:${format}}<extra>step %{x}</extra>`});
    const held_out = {...curve(charts.held_out, "held-out", paint.warm, ".4f"), mode: "markers",
      marker: {color: paint.warm, size: 7, symbol: "diamond"}, hovertemplate: "held-out %{y:.4f}<extra>step %{x}</extra>"};
    const losses = [curve(charts.loss, "training", paint.mark, ".4f"), ...(charts.held_out.x.length ? [held_out] : [])];
    this.draw("loss-chart", losses, paint, marks, {xaxis: {title: {text: "step"}}});
    this.draw("speed-chart", [curve(charts.throughput, "tokens/s", paint.good, ",.0f")], paint, marks,
      {xaxis: {title: {text: "step"}}, yaxis: {rangemode: "tozero", tickformat: "~s", title: {text: "tokens/s"}}});
    const longest = charts.goodput.x.at(-1) || 0;
    const [unit, per] = longest > 7200 ? ["h", 3600] : longest > 300 ? ["min", 60] : ["s", 1];
    const goodput = {...curve(charts.goodput, "goodput", paint.good, ".1%"), x: charts.goodput.x.map(x => x / per),
      mode: charts.goodput.x.length > 1 ? "lines" : "markers", customdata: charts.goodput.x.map(duration),
      fill: "tozeroy", fillcolor: paint.good.replace("rgb(", "rgba(").replace(")", ", 0.13)"),
      hovertemplate: "%{y:.1%}<extra>%{customdata}</extra>"};
    this.draw("goodput-chart", [goodput], paint, [],
      {xaxis: {title: {text: unit}, rangemode: "tozero"}, yaxis: {range: [0, 1.02], tickformat: ".0%"}});
  }

  /** After a change of theme. */
  again() { if (this.drawn) this.show(...this.drawn); }

  draw(id, traces, paint, shapes, special) {
    const place = at(id);
    if (!traces[0].x.length) {
      if (place.data) Plotly.purge(place);
      place.replaceChildren(make("div", {class: "empty"}, "Nothing on record yet."));
      return;
    }
    if (place.firstElementChild && place.firstElementChild.className === "empty") place.replaceChildren();
    const axis = {gridcolor: paint.line, linecolor: paint.line, zerolinecolor: paint.line, tickfont: {size: 11},
      title: {font: {size: 11}, standoff: 4}, automargin: true, fixedrange: true};
    const layout = {
      margin: {l: 44, r: 8, t: traces.length > 1 ? 26 : 8, b: 36}, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
      font: {color: paint.soft, size: 11, family: "system-ui, sans-serif"}, hovermode: "closest", shapes, uirevision: id,
      showlegend: traces.length > 1,
      legend: {orientation: "h", x: 1, xanchor: "right", y: 1.01, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)", font: {size: 11}},
      hoverlabel: {bgcolor: paint.ink, bordercolor: paint.ink, font: {color: paint.card, size: 12}},
      xaxis: {...axis, ...special.xaxis, title: {...axis.title, ...(special.xaxis || {}).title}},
      yaxis: {...axis, ...special.yaxis, title: {...axis.title, ...(special.yaxis || {}).title}},
    };
    Plotly.react(place, traces, layout, CONFIG);
  }
}
