#!/usr/bin/env bash
# Reports in a browser: they open from a file without console errors, every chart shows its values under the pointer and the arrow
# keys, nothing is wider than the window, and a sweep's page can be mailed. Skipped without Chromium.
set -eu
cd "$(dirname "$0")/../.."
browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome) || { echo "no chromium"; exit 77; }
top=$PWD; work=$(mktemp -d /tmp/ckaqad-report-XXXXXX); trap 'rm -rf "$work"' EXIT
run="$top/build/ckaqad"; quick="--calibrate=4 --tensorboard=false"

# shellcheck disable=SC2086
{
"$run" recipes/nemotron_nano.lua --steps=3 --eval_every=1 --calibrate=4 --out="$work/run" >"$work/log" || { cat "$work/log"; exit 1; }
"$run" recipes/nemotron_nano.lua --steps=2 $quick --sweep lr=1e-5,1e-4 --sweep seed=1..2 --out="$work/sweep" >"$work/log" || { cat "$work/log"; exit 1; }
}
for place in run sweep; do (cd "$work" && "$run" runs report "$work/$place" >/dev/null); done # once more, by the command
bytes=$(wc -c <"$work/sweep/report.html")
[ "$bytes" -lt 2000000 ] || { echo "the sweep's report has $bytes bytes"; exit 1; }

cat >"$work/probe.html" <<'EOT'
<pre id="probe">no answer</pre><script>
(function () {
  var out = [], charts = JSON.parse(document.getElementById("data").textContent);
  function say(good, what) { out.push((good ? "good " : "BAD ") + what); }
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
      var s = c.series[0], i = end ? s.x.length - 1 : 0, at = "step " + s.x[i];
      return c.series.some(function (o) { return o.x[0] < s.x[0] || last(o.x) > last(s.x); }) ? [] : [at, value(s.y[i], c)];
    },
    heat: function (c, end) { return end ? [last(c.cols), value(last(last(c.values)), c)] : [c.cols[0], value(c.values[0][0], c)]; },
    parallel: function (c, end) { var l = end ? last(c.lines) : c.lines[0]; return [l.name].concat(l.v.map(function (v) { return value(v, c); })); }
  };
  ends.dots = ends.bars = function (c, end) {
    return [end ? last(c.cats) : c.cats[0]].concat(c.series.map(function (s) { return value(end ? last(s.y) : s.y[0], c); }));
  };
  charts.forEach(function (c, i) {
    var figure = document.getElementById("chart" + i), plot = figure.querySelector(".plot"), box = plot.getBoundingClientRect();
    var name = i + " " + c.kind + " " + figure.querySelector("h3").textContent;
    function legend() { return figure.querySelector(".legend").textContent; }
    function key(k) { plot.dispatchEvent(new KeyboardEvent("keydown", { key: k, bubbles: true })); }
    function pointer(x, y) {
      plot.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + x * box.width, clientY: box.top + y * box.height, pointerType: "mouse" }));
    }
    function holds(parts, how) {
      var text = legend();
      say(parts.every(function (p) { return text.indexOf(p) >= 0; }), name + ", " + how + ": " + text + " | " + parts.join(" | "));
    }
    say(figure.querySelector("svg") && !/NaN|undefined|Infinity/.test(plot.innerHTML), name + " is drawn");
    say(plot.getAttribute("role") === "img" && plot.tabIndex === 0 && plot.getAttribute("aria-label").length > 20, name + " has words");
    key("Home");
    holds(ends[c.kind](c, false), "first");
    var first = legend();
    if (c.kind !== "parallel") key("ArrowRight"), say(legend() !== first, name + " moves: " + first + " -> " + legend());
    key("End");
    holds(ends[c.kind](c, true), "last");
    say(figure.querySelector(".cursor").innerHTML !== "", name + " shows its cursor");
    key("Escape");
    if (c.kind !== "parallel" && !c.square) pointer(0.99, 0.5), say(legend().length > 5, name + " under the pointer: " + legend());
    if (c.kind === "lines" || c.kind === "dots") {
      pointer(0.995, 0.5);
      holds(ends[c.kind](c, true).slice(0, 1), "pointer at the right end");
    }
    plot.dispatchEvent(new PointerEvent("pointerleave", { pointerType: "mouse" }));
    say(figure.querySelector(".cursor").innerHTML === "", name + " lets go");
  });
  var slider = document.getElementById("smoothing");
  say(charts.length > 3, charts.length + " charts");
  function curves() { return Array.prototype.map.call(document.querySelectorAll(".line:not(.thin)"), function (p) { return p.getAttribute("d"); }).join(); }
  slider.value = 0; slider.dispatchEvent(new Event("input"));
  var rough = curves();
  slider.value = 100; slider.dispatchEvent(new Event("input"));
  if (LONG) say(curves() !== rough, "the slider smooths");
  say(document.documentElement.scrollWidth <= innerWidth, "width " + document.documentElement.scrollWidth + " of " + innerWidth);
  document.getElementById("probe").textContent = "\n" + out.join("\n") + "\nend of probe\n";
})();
</script>
EOT

open() { # PAGE WIDTH: its DOM after the scripts, standard error in $work/err
  timeout 60 "$browser" --headless --no-sandbox --disable-gpu --user-data-dir="$work/profile" --window-size="$2",900 \
    --virtual-time-budget=2000 --enable-logging=stderr --dump-dom "file://$1" 2>"$work/err"
}
for place in run sweep; do
  page=$work/$place/report.html
  for width in 400 1400; do
    open "$page" $width >"$work/dom"
    if grep -i 'CONSOLE' "$work/err"; then echo "$page, $width: console"; exit 1; fi
    grep -q '<svg' "$work/dom" || { echo "$page draws nothing"; exit 1; }
    long=false; [ $place = run ] && long=true
    sed "s/LONG/$long/" "$work/probe.html" | cat "$page" - >"$work/$place/probed.html"
    open "$work/$place/probed.html" $width >"$work/dom"
    if ! grep -q 'end of probe' "$work/dom" || grep '^BAD' "$work/dom" || grep -i 'CONSOLE' "$work/err"; then
      echo "$page, $width: the probe fails"; sed -n '/id="probe"/,/end of probe/p' "$work/dom" | head -20; exit 1; fi
    echo "$place, $width px: $(grep -c '^good' "$work/dom") checks"
  done
  if grep -oE '(src|href)="[^"#d.p][^"]*"|https?://|@import|url\(' "$page"; then echo "$page asks the network"; exit 1; fi
done
