"use strict";
const version = document.body.dataset.version;
document.querySelector(`[data-for="${version}"]`).setAttribute("aria-current", "page");

const docs = SwaggerUIBundle({
  url: `/api/${version}/openapi.json`,
  dom_id: "#docs",
  deepLinking: true,
  persistAuthorization: true,
  displayRequestDuration: true,
  defaultModelsExpandDepth: 0,
  docExpansion: "list",
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
