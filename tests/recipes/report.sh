#!/usr/bin/env bash
# Reports in a browser: they open from a file without console errors, every chart shows its values under the pointer and the arrow
# keys, nothing is wider than the window, and a sweep's page can be mailed. Skipped without Chromium.
#
# A window is never narrower than 500 pixels, so the pages stand in frames of 400 and 1400 of one outer page, each with a probe
# appended that drives its charts and tells the outer page what it saw.
set -eu
cd "$(dirname "$0")/../.."
browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome) || { echo "no chromium"; exit 77; }
top=$PWD; run=${CKAQAD:-$top/build/ckaqad}
work=$(mktemp -d /tmp/ckaqad-report-XXXXXX); trap 'rm -rf "$work"' EXIT
fail() { echo "FAILED: $1"; [ ! -e "$work/log" ] || tail -n 5 "$work/log"; exit 1; }

head -n 40 recipes/lab/teacher/train.jsonl >"$work/train.jsonl"
head -n 10 recipes/lab/teacher/holdout.jsonl >"$work/holdout.jsonl"
go() { # NAME OPTIONS...
  local name=$1; shift
  "$run" recipes/nemotron_nano.lua --data="$work/train.jsonl" --holdout="$work/holdout.jsonl" --seq=64 --batch=4 --micro=2 --rows=32 \
    --calibrate=4 --threads=1 --tensorboard=false --out="$work/$name" "$@" >"$work/log" 2>&1 || fail "$name: exit $?"
  rm -f "$work/$name/report.html" # made by the command, from the folder alone, for those that were stopped too
  "$run" runs report --root="$work" "$work/$name" >"$work/log" 2>&1 || fail "$name: runs report: exit $?"
  [ -s "$work/$name/report.html" ] || fail "$name: runs report wrote no report.html"
}
go run --steps=3 --eval_every=1
go stopped --steps=20 --stop_at=4
go none --steps=3 --layer=none
go ce --steps=3 --loss=ce
go sweep --steps=2 --sweep lr=1e-5,1e-4,3e-4,1e-3 --sweep seed=1..3
rm -f "$work/log"
says() { grep -q "$2" "$work/$1/report.html" || fail "$1: the page does not say '$2'"; }
says run "CKA-QAD"; says stopped "No result yet: .* after step 4 of 20"; says ce "Cross-entropy, nats a token"
says none ">QAD<"; says sweep "12 of 12 runs finished"; says sweep "PTQ, untrained"
! grep -q "Weight of\|CKA-QA" "$work/none/report.html" || fail "none: a run without CKA has a weight of CKA, or its name"
bytes=$(wc -c <"$work/sweep/report.html")
[ "$bytes" -lt 2000000 ] || fail "the sweep's report has $bytes bytes"

cat >"$work/probe.html" <<'EOT'
<script>
(function () {
  var out = [], charts = JSON.parse(document.getElementById("data").textContent), place = location.search.slice(1);
  function say(good, what) { out.push((good ? "good " : "BAD ") + place + ": " + what); }
  function value(v, c) {
    if (typeof v === "string") return v;
    if (v === 0) return "0";
    if (v === null) return "-";
    if (Math.abs(v) < 1e-3 || Math.abs(v) >= 1e6) return v.toExponential(2).replace("e+", "e").replace(/\.?0+e/, "e");
    return c.digits === undefined ? String(+v.toPrecision(4)) : v.toFixed(c.digits);
  }
  function last(list) { return list[list.length - 1]; }
  var ends = { // what the legend must say at the first and the last place
    lines: function (c, end) {
      var all = [].concat.apply([], c.series.map(function (s) { return s.x; })), step = Math[end ? "max" : "min"].apply(null, all);
      return ["step " + step].concat(c.series.map(function (s) {
        var here = s.x.indexOf(step);
        return here >= 0 ? value(s.y[here], c) : end && s.points ? value(last(s.y), c) + " at " + last(s.x) : "-";
      }));
    },
    heat: function (c, end) { return end ? [last(c.cols), value(last(last(c.values)), c)] : [c.cols[0], value(c.values[0][0], c)]; },
    strip: function (c, end) {
      var r = end ? last(c.rows) : c.rows[0], list = r.y.filter(function (v) { return v !== null; });
      return [r.name, value(end ? last(list) : list[0], c), value(r.mean, c)];
    },
    parallel: function (c, end) { var l = end ? last(c.lines) : c.lines[0]; return [l.name].concat(l.v.map(function (v) { return value(v, c); })); }
  };
  ends.dots = ends.bars = function (c, end) {
    return [end ? last(c.cats) : c.cats[0]].concat(c.series.map(function (s) { return value(end ? last(s.y) : s.y[0], c); }));
  };
  charts.forEach(function (c, i) {
    var figure = document.getElementById("chart" + i), plot = figure.querySelector(".plot");
    var name = i + " " + c.kind + " " + figure.querySelector("h3").textContent;
    function legend() { return figure.querySelector(".legend").textContent; }
    function key(k) { plot.dispatchEvent(new KeyboardEvent("keydown", { key: k, bubbles: true })); }
    function pointer(x, y) { plot.dispatchEvent(new PointerEvent("pointermove", { clientX: x, clientY: y, pointerType: "mouse" })); }
    function holds(parts, how) {
      var text = legend();
      say(parts.every(function (p) { return text.indexOf(p) >= 0; }), name + ", " + how + ": " + text + " | " + parts.join(" | "));
    }
    say(figure.querySelector("svg") && !/NaN|undefined|Infinity/.test(plot.innerHTML), name + " is drawn");
    say(plot.getAttribute("role") === "img" && plot.tabIndex === 0 && plot.getAttribute("aria-label").length > 20, name + " has words");
    plot.focus();
    key("Home");
    holds(ends[c.kind](c, false), "first");
    var first = legend();
    key("ArrowRight");
    say(legend() !== first, name + " moves: " + first + " -> " + legend());
    key("End");
    holds(ends[c.kind](c, true), "last");
    say(figure.querySelector(".cursor").innerHTML !== "", name + " shows its cursor");
    key("Escape");
    say(figure.querySelector(".cursor").innerHTML === "", name + " lets go of the keys");
    plot.blur();
    var box = plot.getBoundingClientRect();
    if (c.kind === "heat") {
      var cells = 0, known = 0, edge = plot.querySelector(".edge").getBoundingClientRect();
      plot.querySelectorAll("path").forEach(function (p) { cells += p.getAttribute("d").split("M").length - 1; });
      c.values.forEach(function (row) { row.forEach(function (v) { known += v !== null; }); });
      say(cells > 0 && cells === known, name + " has " + cells + " cells of " + known);
      pointer(edge.right - edge.width / c.cols.length / 2, edge.bottom - edge.height / c.rows.length / 2);
      holds(ends.heat(c, true).concat(last(c.rows)), "pointer on the last cell");
    } else if (c.kind === "strip") {
      var spots = plot.querySelectorAll(".dot"), spot = spots[spots.length - 1].getBoundingClientRect(), known = 0;
      c.rows.forEach(function (r) { r.y.forEach(function (v) { known += v !== null; }); });
      say(spots.length === known && plot.querySelectorAll(".mean").length === c.rows.length, name + " has " + spots.length + " dots of " + known);
      pointer(spot.left + spot.width / 2, spot.top + spot.height / 2);
      holds(ends.strip(c, true), "pointer on the last dot");
      key("ArrowUp");
      say(legend().indexOf(c.rows[c.rows.length - 2].name) >= 0, name + " goes up a setting: " + legend());
    } else if (c.kind === "parallel") {
      pointer(box.left + box.width / 2, box.top + box.height / 2);
      say(c.lines.some(function (l) { return legend().indexOf(l.name) >= 0; }), name + " under the pointer: " + legend());
    } else {
      pointer(box.left + 0.96 * box.width, box.top + box.height / 2);
      holds(ends[c.kind](c, true), "pointer at the right end");
    }
    plot.dispatchEvent(new PointerEvent("pointerleave", { pointerType: "mouse" }));
    say(figure.querySelector(".cursor").innerHTML === "", name + " lets go");
  });
  say(charts.length > 3, charts.length + " charts");
  var slider = document.getElementById("smoothing");
  function curves() { return Array.prototype.map.call(document.querySelectorAll(".line:not(.thin)"), function (p) { return p.getAttribute("d"); }).join(); }
  slider.value = 0; slider.dispatchEvent(new Event("input"));
  var rough = curves();
  slider.value = 100; slider.dispatchEvent(new Event("input"));
  if (charts.some(function (c) { return c.kind === "lines" && c.series[0].x.length > 2; })) say(curves() !== rough, "the slider smooths");
  say(document.documentElement.scrollWidth <= innerWidth, "width " + document.documentElement.scrollWidth + " of " + innerWidth);
  parent.postMessage(out.join("\n") + "\nend of probe", "*");
})();
</script>
EOT

open() { # PAGE: its DOM after the scripts; standard error in $work/err
  timeout 60 "$browser" --headless --no-sandbox --disable-gpu --user-data-dir="$work/profile" --window-size=1400,900 \
    --virtual-time-budget=3000 --enable-logging=stderr --dump-dom "file://$1" >"$work/dom" 2>"$work/err" || fail "the browser: exit $?"
  if grep -i 'CONSOLE' "$work/err"; then fail "$1: the console has a word"; fi
}
frames=""; places="run sweep stopped none ce"
for place in $places; do
  if grep -oE '(src|href)="[^"#d.p][^"]*"|https?://|@import|url\(' "$work/$place/report.html"; then fail "$place: the page asks the network"; fi
  cat "$work/$place/report.html" "$work/probe.html" >"$work/$place/probed.html"
  for width in 400 1400; do frames+="<iframe style='border:0;height:900px;width:${width}px' src='$place/probed.html?$place,$width'></iframe>"; done
done
cat >"$work/outer.html" <<EOT
<!doctype html><pre id="seen"></pre><script>
addEventListener("message", function (e) { document.getElementById("seen").textContent += "\n" + e.data + "\n"; });
</script>$frames
EOT
for place in run sweep; do
  open "$work/$place/report.html"
  grep -q '<svg' "$work/dom" || fail "$place: the page draws nothing"
done
open "$work/outer.html"
if grep '^BAD' "$work/dom"; then fail "a chart does not do what it should"; fi
[ "$(grep -c '^end of probe' "$work/dom")" = 10 ] || fail "$(grep -c '^end of probe' "$work/dom") of 10 probes came to their end"
for place in $places; do for width in 400 1400; do
  grep -q "^good $place,$width: width .* of $width" "$work/dom" || fail "$place was not seen $width pixels wide"
done; done
grep -q "^good run,400: the slider smooths" "$work/dom" || fail "the slider was not tried"
echo "5 pages at 400 and 1400 pixels: $(grep -c '^good' "$work/dom") checks; the sweep's page has $bytes bytes"
