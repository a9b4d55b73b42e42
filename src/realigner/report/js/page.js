// The page itself: theme, pages of indices, columns of replies, tabs, printing. Without this file everything but the maps is there.

const explorers = [];

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  for (const explorer of explorers) explorer.redraw();
}

function themes() {
  const button = document.querySelector("[data-theme-switch]");
  button.hidden = false;
  const name = () => (button.textContent = isDark() ? "Light" : "Dark");
  button.addEventListener("click", () => {
    setTheme(isDark() ? "light" : "dark");
    name();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const explorer of explorers) explorer.redraw();
    name();
  });
  name();
}

/** A leading index's page takes the place of everything else. */
function route() {
  const page = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const isIndex = Boolean(page && page.classList.contains("index-page"));
  document.body.classList.toggle("at-index", isIndex);
  for (const other of document.querySelectorAll(".index-page")) other.classList.toggle("here", other === page);
  if (isIndex) {
    page.querySelector("h2").focus({ preventScroll: true });
    scrollTo(0, 0);
  } else {
    if (page) page.scrollIntoView();
    for (const explorer of explorers) explorer.redraw();
  }
}

/** Checkboxes that show and hide what carries their name. */
function toggles() {
  for (const box of document.querySelectorAll("input[data-toggles]")) {
    const show = () => {
      const book = box.closest("[data-book]");
      for (const part of book.querySelectorAll(`[data-part="${CSS.escape(box.dataset.toggles)}"]`)) part.hidden = !box.checked;
    };
    box.addEventListener("change", show);
    show();
  }
}

function tabs() {
  for (const group of document.querySelectorAll("[data-tabs]")) {
    group.hidden = false;
    group.addEventListener("change", () => {
      const chosen = group.querySelector("input:checked").value;
      for (const part of group.parentElement.querySelectorAll("[data-tab]")) part.classList.toggle("off", part.dataset.tab !== chosen);
    });
    group.dispatchEvent(new Event("change"));
  }
}

/** On paper: light. */
function printing() {
  let before = null;
  addEventListener("beforeprint", () => {
    before = document.documentElement.dataset.theme;
    setTheme("light");
  });
  addEventListener("afterprint", () => setTheme(before));
}

async function start() {
  themes();
  toggles();
  tabs();
  printing();
  for (const root of document.querySelectorAll("[data-book]")) {
    const explorer = new Explorer(root.querySelector("[data-explorer]"), new Book(root));
    explorers.push(explorer);
    explorer.root.explorer = explorer; // for whoever looks from outside
    for (const link of root.querySelectorAll("[data-show-index]")) {
      link.addEventListener("click", () => setTimeout(() => explorer.showIndex(Number(link.dataset.showIndex))));
    }
    await explorer.take();
  }
  addEventListener("hashchange", route);
  route();
  performance.mark("ready");
  document.documentElement.dataset.ready = "yes";
}

start();
