"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  document.addEventListener("click", async (event) => {
    const button = event.target.closest(".command button");
    if (!button) return;
    const pre = button.parentElement.querySelector("pre");
    try { await navigator.clipboard.writeText(pre.textContent); button.textContent = "copied"; }
    catch { getSelection().selectAllChildren(pre); }
  });

  const unpacked = async (id) => {
    const bytes = Uint8Array.from(atob(byId(id).textContent), (one) => one.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };

  // Colours are names of the style sheet's variables, so that light and dark are said in one place.
  const coloured = (node, style) => {
    if (typeof node === "string") return node.startsWith("--") ? style.getPropertyValue(node).trim() : node;
    if (Array.isArray(node)) return node.map((one) => coloured(one, style));
    if (node && typeof node === "object") return Object.fromEntries(Object.entries(node).map(([key, one]) => [key, coloured(one, style)]));
    return node;
  };
  const merged = (one, other) => {
    const found = { ...one };
    for (const [key, value] of Object.entries(other))
      found[key] = value && typeof value === "object" && !Array.isArray(value) && found[key] ? merged(found[key], value) : value;
    return found;
  };
  const narrow = matchMedia("(max-width: 600px)"), dark = matchMedia("(prefers-color-scheme: dark)");
  const axis = { gridcolor: "--grid", linecolor: "--line", zeroline: false, automargin: true, ticks: "", title: { font: { size: 12 }, standoff: 8 } };
  const usual = () => ({
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: "--muted" },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 8, r: 8, t: 10, b: 8 },
    hovermode: "x unified", hoverlabel: { bgcolor: "--card", bordercolor: "--line", font: { color: "--text" }, namelength: 40 },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
    xaxis: axis, yaxis: axis, dragmode: narrow.matches ? false : "zoom",
  });
  const draw = (place, figure) => {
    const style = getComputedStyle(document.documentElement);
    const layout = merged(usual(), { ...figure.layout, autosize: true, height: figure.height });
    return Plotly.react(place, coloured(figure.data, style), coloured(layout, style), { displayModeBar: false, responsive: true });
  };
  // What Plotly draws, once it is unpacked; the figures of the page as it is now.
  const loaded = async () => {
    const script = document.createElement("script");
    script.textContent = await unpacked("plotly");
    document.head.append(script);
  };
  const all = async () => {
    const figures = byId("figures") ? JSON.parse(await unpacked("figures")) : [];
    const places = [...document.querySelectorAll(".chart")];
    if (places.length && typeof Plotly === "undefined") await loaded();
    for (const place of places) {
      await draw(place, figures[place.dataset.figure]);
      await new Promise((then) => setTimeout(then));
    }
    document.documentElement.dataset.drawn = places.length;
  };
  const start = async () => {
    if (typeof DecompressionStream === "undefined") {
      for (const place of document.querySelectorAll(".chart")) place.textContent = "Charts need a browser of 2023 or later.";
      return;
    }
    dark.addEventListener("change", all);
    narrow.addEventListener("change", all);
    await all();
  };

  // A page that is served while its run trains asks for what is new, and puts it in place.
  const renewed = async () => {
    const answer = await fetch("/live", { cache: "no-store" }).catch(() => null);
    if (!answer || !answer.ok) return again();
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    const figures = fresh.getElementById("figures");
    if (figures && !byId("plotly")) return location.reload();
    for (const name of ["header", "nav", "main"]) document.querySelector(name).replaceWith(fresh.querySelector(name));
    if (figures) byId("figures").textContent = figures.textContent;
    await all();
    if (fresh.documentElement.dataset.live) again();
  };
  const again = () => setTimeout(renewed, 1000 * document.documentElement.dataset.live);
  start().then(() => document.documentElement.dataset.live && again());
})();
