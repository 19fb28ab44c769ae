-- report_script.lua - what makes the charts of a report: plain JavaScript, no library.
--
-- The page holds one JSON list of charts; every chart draws itself into its .plot as SVG at the width it has, and again when that
-- changes. A chart has a cursor that the pointer or the arrow keys move; the legend above it shows the values there. Text from the
-- data reaches the page only through esc().
return [==[
(function () {
"use strict";
var charts = JSON.parse(document.getElementById("data").textContent), smoothing = 0;

function esc(s) {
  return String(s).replace(/[&<>"]/g, function (c) { return { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" }[c]; });
}
function known(v) { return typeof v === "number" && isFinite(v); }
function show(v, digits) {
  if (!known(v)) return typeof v === "string" ? v : "-";
  if (v === 0) return "0";
  var size = Math.abs(v);
  if (size < 1e-3 || size >= 1e6) return v.toExponential(2).replace("e+", "e").replace(/\.?0+e/, "e");
  return digits === undefined ? String(+v.toPrecision(4)) : v.toFixed(digits);
}
function color(i) { return "var(--s" + i % 8 + ")"; }

// Round numbers in [low, high], about n of them.
function ticks(low, high, n) {
  var raw = (high - low) / n, unit = Math.pow(10, Math.floor(Math.log10(raw))), list = [], step = unit;
  [1, 2, 2.5, 5, 10].some(function (k) { step = k * unit; return step >= raw * 0.999; });
  for (var i = Math.ceil(low / step - 1e-9); i <= high / step + 1e-9; i++) list.push(+(i * step).toPrecision(12));
  return list;
}
function extent(lists, zero) {
  var low = zero ? 0 : Infinity, high = -Infinity;
  lists.forEach(function (list) {
    list.forEach(function (v) { if (known(v)) { low = Math.min(low, v); high = Math.max(high, v); } });
  });
  if (low > high) return [0, 1];
  if (low === high) { low -= Math.abs(low) * 0.05 || 0.5; high += Math.abs(high) * 0.05 || 0.5; return zero ? [0, high] : [low, high]; }
  var pad = (high - low) * 0.06;
  return [zero || (low >= 0 && low < pad) ? Math.min(low, 0) : low - pad, high + pad];
}

// Smallest and largest number of all lists.
function bounds(lists) {
  var all = [].concat.apply([], lists).filter(known);
  return all.length ? [Math.min.apply(null, all), Math.max.apply(null, all)] : [0, 1];
}

// Mean over a window around each point, narrower at the ends so that nothing lags.
function smooth(list) {
  var half = Math.round(smoothing / 100 * list.length / 3);
  if (!half) return list;
  return list.map(function (v, i) {
    var w = Math.min(half, i, list.length - 1 - i), sum = 0, n = 0;
    for (var j = i - w; j <= i + w; j++) if (known(list[j])) { sum += list[j]; n++; }
    return known(v) && n ? sum / n : null;
  });
}
function path(xs, ys, px, py) {
  var d = "", pen = "M";
  ys.forEach(function (y, i) {
    if (!known(y)) { pen = "M"; return; }
    d += pen + px(xs[i]).toFixed(1) + " " + py(y).toFixed(1);
    pen = "L";
  });
  return d;
}
function text(x, y, s, anchor, cls) {
  return '<text x="' + x.toFixed(1) + '" y="' + y.toFixed(1) + '" text-anchor="' + (anchor || "middle") + '"' +
    (cls ? ' class="' + cls + '"' : "") + ">" + esc(s) + "</text>";
}
function rule(x1, y1, x2, y2, cls) {
  return '<line class="' + cls + '" x1="' + x1.toFixed(1) + '" y1="' + y1.toFixed(1) + '" x2="' + x2.toFixed(1) + '" y2="' +
    y2.toFixed(1) + '"/>';
}

// Left axis with ticks, name of the bottom axis; gives the places of the frame.
function frame(w, h, y, name) {
  var marks = ticks(y[0], y[1], 4), labels = marks.map(function (v) { return show(v); }), wide = 0;
  labels.forEach(function (s) { wide = Math.max(wide, s.length); });
  var f = { left: 14 + 6.6 * wide, right: w - 12, top: 8, bottom: h - 34, out: "" };
  f.py = function (v) { return f.top + (y[1] - v) / (y[1] - y[0]) * (f.bottom - f.top); };
  marks.forEach(function (v, i) {
    f.out += rule(f.left, f.py(v), f.right, f.py(v), "grid") + text(f.left - 7, f.py(v) + 4, labels[i], "end");
  });
  f.out += text(f.right, h - 4, name, "end");
  return f;
}
function legend(chart, at, items) {
  chart.legend.innerHTML = (at === "" ? "" : '<span class="at">' + esc(at) + "</span>") + items.map(function (it) {
    var mark = it.color === undefined ? "" : '<i class="' + (it.dash ? "dash" : "") + '" style="--c:' + color(it.color) + '"></i>';
    return "<span>" + mark + esc(it.name) + " <b>" + esc(it.value) + "</b></span>";
  }).join("");
}
// Items of one name as one, with all their values.
function grouped(items) {
  var list = [];
  items.forEach(function (it) {
    var same = list.filter(function (o) { return o.name === it.name; })[0];
    if (same) same.value += " / " + it.value;
    else list.push(it);
  });
  return list;
}
function put(chart, w, h, inside) {
  chart.plot.innerHTML = '<svg viewBox="0 0 ' + w + " " + h + '" aria-hidden="true">' + inside + '<g class="cursor"></g></svg>';
  chart.cursor = chart.plot.querySelector(".cursor");
}
function nearest(list, x) {
  var best = 0;
  list.forEach(function (v, i) { if (Math.abs(v - x) < Math.abs(list[best] - x)) best = i; });
  return best;
}

var kinds = {};

kinds.lines = {
  start: function (c) {
    var seen = {};
    c.series.forEach(function (s) { (s.x || c.x).forEach(function (x) { seen[x] = 1; }); });
    c.steps = Object.keys(seen).map(Number).sort(function (a, b) { return a - b; });
    c.rest = c.steps.length - 1;
  },
  draw: function (c, w) {
    var h = c.height || 230, y = extent(c.series.map(function (s) { return s.y; }), c.zero), f = frame(w, h, y, c.xname || "step");
    var first = c.steps[0], last = c.steps[c.steps.length - 1], span = last - first || 1;
    c.px = function (x) { return f.left + (x - first) / span * (f.right - f.left); };
    c.f = f;
    ticks(first, first + span, Math.max(2, Math.floor(w / 90))).forEach(function (x) {
      if (x === Math.floor(x) && x <= last) f.out += text(c.px(x), f.bottom + 17, String(x));
    });
    c.smooth = c.series.map(function (s) { return s.points || s.exact ? s.y : smooth(s.y); });
    c.series.forEach(function (s, i) {
      var xs = s.x || c.x, style = ' style="stroke:' + color(s.color) + '"', dash = s.dash ? " dashed" : "";
      if (c.smooth[i] !== s.y) f.out += '<path class="line thin"' + style + ' d="' + path(xs, s.y, c.px, f.py) + '"/>';
      f.out += '<path class="line' + dash + '"' + style + ' d="' + path(xs, c.smooth[i], c.px, f.py) + '"/>';
      if (s.points || xs.length === 1) xs.forEach(function (x, k) {
        if (known(s.y[k])) f.out += '<circle r="3.5" cx="' + c.px(x).toFixed(1) + '" cy="' + f.py(s.y[k]).toFixed(1) +
          '" style="fill:' + color(s.color) + '"/>';
      });
    });
    put(c, w, h, f.out);
  },
  find: function (c, x) { return nearest(c.steps.map(c.px), x); },
  key: function (c, i, dx, dy) { return Math.max(0, Math.min(c.steps.length - 1, i + dx - dy)); },
  size: function (c) { return c.steps.length; },
  show: function (c, i, on) {
    var step = c.steps[i], out = on ? rule(c.px(step), c.f.top, c.px(step), c.f.bottom, "cross") : "";
    legend(c, (c.xname || "step") + " " + step, grouped(c.series.map(function (s, k) {
      var xs = s.x || c.x, at = xs.length - 1, v;
      while (at > 0 && xs[at] > step) at--;
      v = xs[at] > step || !s.points && xs[xs.length - 1] < step ? null : s.y[at]; // none before a curve begins or after it ends
      if (on && known(v)) out += '<circle r="4" class="hit" cx="' + c.px(xs[at]).toFixed(1) + '" cy="' +
        c.f.py(c.smooth[k][at]).toFixed(1) + '" style="fill:' + color(s.color) + '"/>';
      return { name: s.group || s.name, color: s.color, dash: s.dash,
        value: show(v) + (known(v) && s.points && xs[at] !== step ? " at " + xs[at] : "") };
    })));
    c.cursor.innerHTML = out;
  }
};

// Categories on the bottom axis: bars from zero, or dots joined from the first series to the last.
kinds.dots = kinds.bars = {
  start: function (c) { c.rest = c.cats.length - 1; },
  draw: function (c, w) {
    var h = c.height || 250, bars = c.kind === "bars", n = c.cats.length;
    var f = frame(w, h, extent(c.series.map(function (s) { return s.y; }), bars), c.name), wide = (f.right - f.left) / n;
    var most = 0;
    c.f = f; c.wide = wide;
    c.cats.forEach(function (s) { most = Math.max(most, s.length); });
    var every = Math.ceil((most * 7 + 8) / wide);
    c.cats.forEach(function (s, i) {
      var x = f.left + (i + 0.5) * wide;
      if (i % every === 0) f.out += text(x, f.bottom + 17, s);
      if (!bars && c.series.length > 1 && known(c.series[0].y[i]) && known(c.series[1].y[i]))
        f.out += '<line class="join" x1="' + x + '" x2="' + x + '" y1="' + f.py(c.series[0].y[i]).toFixed(1) + '" y2="' +
          f.py(c.series[1].y[i]).toFixed(1) + '"/>';
      c.series.forEach(function (s, k) {
        var v = s.y[i], thick = Math.min(26, wide * 0.8 / c.series.length);
        if (!known(v)) return;
        if (bars) f.out += '<rect x="' + (x + (k - c.series.length / 2) * thick).toFixed(1) + '" width="' + (thick - 1).toFixed(1) +
          '" y="' + f.py(Math.max(v, 0)).toFixed(1) + '" height="' + Math.max(0.5, Math.abs(f.py(0) - f.py(v))).toFixed(1) +
          '" style="fill:' + color(s.color) + '"/>';
        else f.out += '<circle r="' + Math.min(4.5, Math.max(2.5, wide / 3)) + '" cx="' + x.toFixed(1) + '" cy="' +
          f.py(v).toFixed(1) + '" style="fill:' + color(s.color) + '"/>';
      });
    });
    put(c, w, h, f.out);
  },
  find: function (c, x) { return Math.max(0, Math.min(c.cats.length - 1, Math.floor((x - c.f.left) / c.wide))); },
  key: function (c, i, dx, dy) { return Math.max(0, Math.min(c.cats.length - 1, i + dx - dy)); },
  size: function (c) { return c.cats.length; },
  show: function (c, i, on) {
    legend(c, on ? c.name + " " + c.cats[i] : "", c.series.map(function (s) {
      return { name: s.name, color: s.color, value: on ? show(s.y[i], c.digits) + (c.unit || "") : "" };
    }));
    c.cursor.innerHTML = on ? '<rect class="column" x="' + (c.f.left + i * c.wide).toFixed(1) + '" width="' + c.wide.toFixed(1) +
      '" y="' + c.f.top + '" height="' + (c.f.bottom - c.f.top) + '"/>' : "";
  }
};

// Rows of dots over one bottom axis, the same seed on the same level of every row; a bar at each row's mean.
kinds.strip = {
  start: function (c) {
    c.rest = 0;
    c.spots = [];
    c.rows.forEach(function (r, i) { r.y.forEach(function (v, k) { if (known(v)) c.spots.push([i, k]); }); });
  },
  draw: function (c, w) {
    var n = c.rows.length, tall = Math.max(9, Math.min(34, 620 / n)), long = 0;
    var top = c.line ? 20 : 8, bottom = top + n * tall, h = bottom + 36;
    var span = bounds(c.rows.map(function (r) { return r.y; })), at = c.line && c.line.x, out = "", shown = false;
    if (known(at)) { // what all began with, unless it makes the rest small
      var with_line = [Math.min(span[0], at), Math.max(span[1], at)];
      shown = span[1] > span[0] ? with_line[1] - with_line[0] <= 3 * (span[1] - span[0]) : true;
      if (shown) span = with_line;
    }
    var log = span[0] > 0 && span[1] / span[0] > 30, low = span[0], high = span[1];
    var pad = (high - low) * 0.04 || Math.abs(high) * 0.05 || 0.5;
    if (log) { low /= 1.15; high *= 1.15; } else { low -= pad; high += pad; }
    c.rows.forEach(function (r) { long = Math.max(long, r.name.length); });
    var left = Math.min(16 + 6.9 * long, w * 0.4), right = w - 16, most = Math.floor((left - 12) / 6.6);
    c.px = function (v) { return left + (log ? Math.log(v / low) / Math.log(high / low) : (v - low) / (high - low)) * (right - left); };
    c.py = function (i, k) {
      var many = c.seeds.length, step = many > 1 ? Math.min(5, 0.72 * tall / (many - 1)) : 0;
      return top + (i + 0.5) * tall + (k - (many - 1) / 2) * step;
    };
    c.g = { left: left, right: right, top: top, bottom: bottom, tall: tall };
    var marks = ticks(low, high, Math.max(2, Math.floor((right - left) / 80)));
    if (log) {
      marks = [];
      for (var e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) [1, 3].forEach(function (k) {
        var v = +(k * Math.pow(10, e)).toPrecision(3);
        if (v >= low && v <= high) marks.push(v);
      });
    }
    marks.forEach(function (v) { out += rule(c.px(v), top, c.px(v), bottom, "grid") + text(c.px(v), bottom + 17, show(v)); });
    out += text(right, h - 3, c.name, "end");
    if (shown) out += rule(c.px(at), top, c.px(at), bottom, "cross") + text(c.px(at), top - 6, c.line.name);
    var down = Math.ceil(13 / tall);
    c.rows.forEach(function (r, i) {
      var name = r.name.length > most ? r.name.slice(0, most - 1) + "\u2026" : r.name;
      if (i % down === 0) out += text(left - 8, top + (i + 0.5) * tall + 4, name, "end");
      r.y.forEach(function (v, k) {
        if (known(v)) out += '<circle class="dot" r="' + Math.min(4, tall / 3).toFixed(1) + '" cx="' + c.px(v).toFixed(1) + '" cy="' +
          c.py(i, k).toFixed(1) + '" style="fill:' + color(r.color) + '"/>';
      });
      if (known(r.mean)) out += '<line class="mean" x1="' + c.px(r.mean).toFixed(1) + '" x2="' + c.px(r.mean).toFixed(1) + '" y1="' +
        (top + (i + 0.1) * tall).toFixed(1) + '" y2="' + (top + (i + 0.9) * tall).toFixed(1) + '" style="stroke:' + color(r.color) + '"/>';
    });
    put(c, w, h, out);
  },
  find: function (c, x, y) {
    var best = 0, least = Infinity;
    c.spots.forEach(function (s, j) {
      var away = Math.abs(y - c.g.top - (s[0] + 0.5) * c.g.tall) > c.g.tall / 2 ? 1e6 : 0;
      var off = Math.abs(y - c.py(s[0], s[1])) + Math.abs(x - c.px(c.rows[s[0]].y[s[1]])) + away;
      if (off < least) { least = off; best = j; }
    });
    return best;
  },
  key: function (c, j, dx, dy) { // left and right: a run; up and down: the same seed of the setting beside
    var s = c.spots[j], row = Math.max(0, Math.min(c.rows.length - 1, s[0] - dy)), to = j + dx, least = Infinity;
    if (dy) c.spots.forEach(function (o, m) {
      var off = Math.abs(o[1] - s[1]);
      if (o[0] === row && off < least) { least = off; to = m; }
    });
    return Math.max(0, Math.min(c.spots.length - 1, to));
  },
  size: function (c) { return c.spots.length; },
  show: function (c, j, on) {
    if (!on) {
      c.legend.innerHTML = '<span class="dim">' + c.spots.length + " runs; point at one, or focus and use the arrow keys</span>";
      c.cursor.innerHTML = "";
      return;
    }
    var s = c.spots[j], r = c.rows[s[0]], out = "", d = "", pen = "M";
    legend(c, r.name, [{ name: "seed " + c.seeds[s[1]], color: r.color, value: show(r.y[s[1]], c.digits) }, { name: "mean", value:
      show(r.mean, c.digits) + (known(r.sd) ? " \u00b1 " + r.sd.toFixed(c.digits) : "") }]);
    c.rows.forEach(function (o, i) {
      if (!known(o.y[s[1]])) { pen = "M"; return; }
      d += pen + c.px(o.y[s[1]]).toFixed(1) + " " + c.py(i, s[1]).toFixed(1);
      pen = "L";
    });
    out += '<rect class="column" x="0" width="' + c.g.right.toFixed(1) + '" y="' + (c.g.top + s[0] * c.g.tall).toFixed(1) + '" height="' +
      c.g.tall.toFixed(1) + '"/><path class="line join" d="' + d + '"/><circle class="ring" r="6" cx="' + c.px(r.y[s[1]]).toFixed(1) +
      '" cy="' + c.py(s[0], s[1]).toFixed(1) + '"/>';
    c.cursor.innerHTML = out;
  }
};

kinds.heat = {
  start: function (c) { c.rest = 0; c.range = c.range || bounds(c.values); },
  draw: function (c, w) {
    var rows = c.rows.length, cols = c.cols.length, long = 0, levels = 24, low = c.range[0], high = c.range[1];
    c.rows.forEach(function (s) { long = Math.max(long, s.length); });
    var left = 30 + 7.2 * long, wide = (w - left - 12) / cols, tall = Math.max(7, Math.min(22, 380 / rows));
    if (c.square) { wide = Math.min(wide, 460 / cols, 34); tall = wide; }
    var h = 8 + rows * tall + 34, out = "", buckets = [], i, k;
    c.g = { left: left, top: 8, wide: wide, tall: tall };
    for (i = 0; i < rows; i++) for (k = 0; k < cols; k++) {
      var v = c.values[i][k];
      if (!known(v)) continue;
      var part = high > low ? (v - low) / (high - low) : 1;
      if (c.invert) part = 1 - part;
      var level = Math.max(0, Math.min(levels, Math.round(part * levels)));
      buckets[level] = (buckets[level] || "") + "M" + (left + k * wide).toFixed(1) + " " + (8 + i * tall).toFixed(1) + "h" +
        wide.toFixed(2) + "v" + tall.toFixed(2) + "h-" + wide.toFixed(2) + "z";
    }
    buckets.forEach(function (d, level) {
      out += '<path d="' + d + '" style="fill:' + color(c.color) + ";fill-opacity:" + (0.03 + 0.97 * level / levels).toFixed(3) + '"/>';
    });
    out += '<rect class="edge" x="' + left + '" y="8" width="' + (cols * wide).toFixed(1) + '" height="' + (rows * tall).toFixed(1) + '"/>';
    var down = Math.ceil(13 / tall), most = 0;
    c.cols.forEach(function (s) { most = Math.max(most, s.length); });
    var across = Math.ceil((most * 6.8 + 8) / wide);
    c.rows.forEach(function (s, r) { if (r % down === 0) out += text(left - 6, 8 + (r + 0.5) * tall + 4, s, "end"); });
    c.cols.forEach(function (s, r) { if (r % across === 0) out += text(left + (r + 0.5) * wide, h - 17, s); });
    out += text(left + cols * wide, h - 3, c.colname, "end");
    out += '<text transform="translate(11 ' + (8 + rows * tall / 2).toFixed(1) + ') rotate(-90)" text-anchor="middle">' +
      esc(c.rowname) + "</text>";
    put(c, w, h, out);
  },
  find: function (c, x, y) {
    var k = Math.floor((x - c.g.left) / c.g.wide), i = Math.floor((y - c.g.top) / c.g.tall);
    k = Math.max(0, Math.min(c.cols.length - 1, k));
    return Math.max(0, Math.min(c.rows.length - 1, i)) * c.cols.length + k;
  },
  key: function (c, at, dx, dy) {
    var n = c.cols.length, k = Math.max(0, Math.min(n - 1, at % n + dx));
    return Math.max(0, Math.min(c.rows.length - 1, Math.floor(at / n) - dy)) * n + k;
  },
  size: function (c) { return c.rows.length * c.cols.length; },
  show: function (c, at, on) {
    var n = c.cols.length, i = Math.floor(at / n), k = at % n, bar = c.invert ? "to left" : "to right";
    var unit = c.unit || "", ends = c.range.map(function (v) { return esc(show(v) + unit); });
    c.legend.innerHTML = "<span>" + ends[0] + ' <i class="ramp" style="--c:' + color(c.color) + ";--d:" + bar + '"></i> ' + ends[1] +
      "</span>" + (on ? '<span class="at">' + esc(c.rowname + " " + c.rows[i] + ", " + c.colname + " " + c.cols[k]) + "</span><span>" +
      esc(c.what) + " <b>" + esc(show(c.values[i][k], c.digits) + unit) + "</b></span>" : "");
    c.cursor.innerHTML = on ? '<rect class="cell" x="' + (c.g.left + k * c.g.wide) + '" y="' + (c.g.top + i * c.g.tall) +
      '" width="' + c.g.wide + '" height="' + c.g.tall + '"/>' : "";
  }
};

kinds.parallel = {
  start: function (c) {
    c.rest = 0;
    c.axes.forEach(function (a, k) {
      var list = c.lines.map(function (l) { return l.v[k]; }), numbers = list.filter(known);
      a.names = numbers.length === list.filter(function (v) { return v !== null; }).length ? null : [];
      if (a.names) list.forEach(function (v) { if (v !== null && a.names.indexOf(String(v)) < 0) a.names.push(String(v)); });
      a.low = Math.min.apply(null, numbers);
      a.high = Math.max.apply(null, numbers);
      a.log = !a.names && a.low > 0 && a.high / a.low > 8;
    });
  },
  place: function (a, v) {
    if (a.names) return a.names.length < 2 ? 0.5 : a.names.indexOf(String(v)) / (a.names.length - 1);
    if (a.high === a.low) return 0.5;
    return a.log ? Math.log(v / a.low) / Math.log(a.high / a.low) : (v - a.low) / (a.high - a.low);
  },
  draw: function (c, w) {
    var n = c.axes.length, h = 330, top = 64, bottom = h - 38, edge = Math.min(60, w * 0.1), gap = n > 1 ? (w - 2 * edge) / (n - 1) : 0;
    var out = "";
    c.xy = c.lines.map(function (l) {
      return l.v.map(function (v, k) {
        return v === null ? null : [edge + k * gap, bottom - kinds.parallel.place(c.axes[k], v) * (bottom - top)];
      });
    });
    c.d = c.xy.map(function (points) {
      var d = "", pen = "M";
      points.forEach(function (p) { if (!p) { pen = "M"; return; } d += pen + p[0].toFixed(1) + " " + p[1].toFixed(1); pen = "L"; });
      return d;
    });
    c.lines.forEach(function (l, i) { out += '<path class="line" style="stroke:' + color(l.color) + '" d="' + c.d[i] + '"/>'; });
    c.axes.forEach(function (a, k) {
      var x = edge + k * gap, anchor = k === 0 ? "start" : k === n - 1 ? "end" : "middle", at = k === 0 ? x - edge + 4 : k === n - 1 ?
        x + edge - 4 : x;
      var lower = k % 2 && gap < 110 ? 14 : 0; // neighbours on two lines where there is no room beside each other
      out += rule(x, top, x, bottom, "axis") + text(at, 14 + lower, a.name, anchor, "strong");
      if (a.names) a.names.forEach(function (s, i) {
        out += text(k === n - 1 ? x - 6 : x + 6, bottom - kinds.parallel.place(a, s) * (bottom - top) + 4, s,
          k === n - 1 ? "end" : "start", "halo");
      });
      else if (known(a.low)) {
        out += text(at, bottom + 17 + lower, show(a.low), anchor);
        if (a.high > a.low) out += text(at, 44 + lower, show(a.high), anchor);
      }
    });
    put(c, w, h, out);
  },
  find: function (c, x, y) {
    var best = 0, least = Infinity;
    c.xy.forEach(function (points, i) {
      for (var k = 0; k + 1 < points.length; k++) {
        var a = points[k], b = points[k + 1];
        if (!a || !b || x < a[0] - 1 || x > b[0] + 1) continue;
        var off = Math.abs(a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0] || 1) - y);
        if (off < least) { least = off; best = i; }
      }
    });
    return best;
  },
  key: function (c, i, dx, dy) { return Math.max(0, Math.min(c.lines.length - 1, i + dx - dy)); },
  size: function (c) { return c.lines.length; },
  show: function (c, i, on) {
    var l = c.lines[i];
    c.plot.classList.toggle("picked", on);
    if (!on) {
      c.legend.innerHTML = '<span class="dim">' + c.lines.length + " runs; point at one, or focus and use the arrow keys</span>";
      c.cursor.innerHTML = "";
      return;
    }
    legend(c, l.name, c.axes.map(function (a, k) { return { name: a.name, value: show(l.v[k]) }; }));
    c.cursor.innerHTML = '<path class="line pick" style="stroke:' + color(l.color) + '" d="' + c.d[i] + '"/>';
  }
};

function draw(c) {
  var w = Math.floor(c.plot.clientWidth);
  if (!w) return;
  c.width = w;
  kinds[c.kind].draw(c, w);
  kinds[c.kind].show(c, c.on ? c.at : c.rest, c.on);
}
function move(c, at, on) {
  c.at = at;
  c.on = on;
  kinds[c.kind].show(c, on ? at : c.rest, on);
}
function wire(c, i) {
  var kind = kinds[c.kind], figure = document.getElementById("chart" + i);
  c.plot = figure.querySelector(".plot");
  c.legend = figure.querySelector(".legend");
  c.at = 0;
  c.on = false;
  kind.start(c);
  draw(c);
  function point(e) {
    var box = c.plot.getBoundingClientRect(), scale = c.width / box.width;
    move(c, kind.find(c, (e.clientX - box.left) * scale, (e.clientY - box.top) * scale), true);
  }
  c.plot.addEventListener("pointermove", point);
  c.plot.addEventListener("pointerdown", point);
  c.plot.addEventListener("pointerleave", function (e) { if (e.pointerType === "mouse") move(c, c.at, false); });
  c.plot.addEventListener("focus", function () { if (!c.on) move(c, c.at || c.rest, true); });
  c.plot.addEventListener("blur", function () { move(c, c.at, false); });
  c.plot.addEventListener("keydown", function (e) {
    var to = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[e.key], big = e.shiftKey ? 10 : 1;
    if (to) move(c, kind.key(c, c.on ? c.at : c.rest, to[0] * big, to[1] * big), true);
    else if (e.key === "Home") move(c, 0, true);
    else if (e.key === "End") move(c, kind.size(c) - 1, true);
    else if (e.key === "Escape") move(c, c.at, false);
    else return;
    e.preventDefault();
  });
}

charts.forEach(wire);
var slider = document.getElementById("smoothing");
if (slider) {
  slider.addEventListener("input", function () {
    smoothing = +slider.value;
    charts.forEach(function (c) { if (c.kind === "lines") draw(c); });
  });
  smoothing = +slider.value;
  charts.forEach(function (c) { if (c.kind === "lines") draw(c); });
}
var pending = 0;
window.addEventListener("resize", function () {
  cancelAnimationFrame(pending);
  pending = requestAnimationFrame(function () { charts.forEach(function (c) { if (c.plot.clientWidth !== c.width) draw(c); }); });
});
})();
]==]
