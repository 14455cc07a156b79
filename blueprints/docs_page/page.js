"use strict";
const version = document.body.dataset.version;
const contents = document.querySelector(".contents");
const main = document.querySelector("#docs");
document.querySelector(`[data-for="${version}"]`).setAttribute("aria-current", "page");

// Calls a function with whether a media query holds, now and whenever that changes.
const watch = (query, act) => {
  const media = matchMedia(query);
  media.addEventListener("change", () => act(media.matches));
  act(media.matches);
  return media;
};
watch("(prefers-color-scheme: dark)", (dark) => {
  document.documentElement.classList.toggle("dark-mode", dark);
});
const wide = watch("(min-width: 64rem)", (holds) => { contents.open = holds; });
contents.querySelector("nav").addEventListener("click", (event) => {
  event.stopPropagation();  // Swagger UI would scroll by itself, to behind the bar
  contents.open = wide.matches;
});

// The introduction's headings and the groups of operations, listed once they are drawn.
const drawn = new MutationObserver(() => {
  if (!main.querySelector(".opblock-tag")) return;
  drawn.disconnect();
  for (const target of main.querySelectorAll(".info .renderedMarkdown h2, .opblock-tag")) {
    const link = document.createElement("a");
    link.textContent = target.dataset.tag ?? target.textContent;
    target.id ||= link.textContent.toLowerCase().replaceAll(" ", "-");
    link.href = `#${target.id}`;
    link.className = target.localName;
    contents.querySelector("nav").append(link);
  }
  document.getElementById(location.hash.slice(1))?.scrollIntoView();
});
drawn.observe(main, {childList: true, subtree: true});

// The examples name the address that this page is from.
const here = (text) => text.replaceAll("http://localhost:8000", location.origin);

const docs = SwaggerUIBundle({
  url: `/api/${version}/openapi.json`,
  dom_id: "#docs",
  deepLinking: true,
  persistAuthorization: true,
  displayRequestDuration: true,
  defaultModelsExpandDepth: 0,
  docExpansion: "list",
  plugins: [{statePlugins: {
    spec: {wrapActions: {updateSpec: (update) => (text) => update(here(text))}},
    layout: {wrapActions: {
      // Only "#/…" is the viewer's; "#errors" is a heading.
      parseDeepLinkHash: (follow) => (hash) => { if (hash.startsWith("#/")) follow(hash); },
      scrollToElement: () => (element) => element.scrollIntoView(),
    }},
  }}],
  // A login on the page authorizes the page: its token goes where "Authorize" would put it.
  responseInterceptor: (response) => {
    if (response.ok && /\/auth\/(login|register)$/.test(response.url)) {
      try {
        docs.preauthorizeApiKey("bearer", JSON.parse(response.text).token);
      } catch (error) {
        console.warn(error);
      }
    }
    return response;
  },
});
