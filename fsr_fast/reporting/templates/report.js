"use strict";
(() => {
  const root = document.documentElement;
  const specifications = JSON.parse(document.getElementById("specifications").textContent);

  function draw() {
    const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
    const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"), automargin: true };
    for (const place of document.querySelectorAll("[data-chart]")) {
      const { data, layout } = specifications[place.dataset.chart];
      const themed = {
        ...layout,
        template: {},
        margin: { l: 60, r: 15, t: 25, b: 45 },
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        font: { color: colour("--ink"), family: "system-ui, sans-serif", size: 13 },
        xaxis: { ...axis, ...layout.xaxis },
        yaxis: { ...axis, ...layout.yaxis },
        legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      };
      Plotly.react(place, data, themed, { responsive: true, displaylogo: false, displayModeBar: false });
    }
  }

  const button = document.getElementById("theme");
  function setTheme(dark) {
    root.dataset.theme = dark ? "dark" : "light";
    button.setAttribute("aria-pressed", String(dark));
    draw();
  }
  const preference = matchMedia("(prefers-color-scheme: dark)");
  preference.addEventListener("change", (event) => setTheme(event.matches));
  button.addEventListener("click", () => setTheme(root.dataset.theme !== "dark"));

  for (const gallery of document.querySelectorAll("[data-gallery]")) {
    const articles = [...gallery.querySelectorAll("article")];
    const order = [...articles];
    function choose(choice) {
      const shown = choice === "worst" ? [...order].reverse() : order;
      for (const article of shown) {
        article.hidden = choice !== "all" && !article.dataset.choices.split(" ").includes(choice);
        gallery.append(article);
      }
      const count = articles.filter((article) => !article.hidden).length;
      const pictures = count === 1 ? "1 picture" : `${count} pictures`;
      gallery.querySelector(".count").textContent = `${pictures}, ${choice === "worst" ? "worst" : "best"} first`;
    }
    gallery.addEventListener("change", (event) => choose(event.target.value));
    choose("all");
  }

  for (const series of document.querySelectorAll("[data-snapshots]")) {
    const pictures = [...series.querySelectorAll("img")];
    series.querySelector("input").addEventListener("input", (event) => {
      pictures.forEach((picture, index) => { picture.hidden = index !== Number(event.target.value); });
      series.querySelector("output").textContent = pictures[event.target.value].dataset.iteration;
    });
  }

  setTheme(preference.matches);
})();
