// Uses the shop through openapi-fetch; the compiler holds every call to the document.
import createClient from "openapi-fetch";
import type { paths } from "./schema";

declare const process: { argv: string[] };
const [baseUrl, email, password] = process.argv.slice(2);

const shop = createClient<paths>({ baseUrl });
const signedIn = (token: string) =>
  createClient<paths>({ baseUrl, headers: { Authorization: `Bearer ${token}` } });

async function main() {
  const me = { email: `ts${Date.now()}@example.com`, password: "a long walk home" };
  const registered = await shop.POST("/api/v1/auth/register", { body: { ...me, name: "Ada" } });
  if (registered.error) throw registered.error;
  const login = await shop.POST("/api/v1/auth/login", { body: me });
  if (login.error) throw login.error;

  const found: number[] = [];
  let cursor: string | undefined;
  do {
    const page = await shop.GET("/api/v1/products", { params: { query: { limit: 2, cursor } } });
    if (page.error) throw page.error;
    found.push(...page.data.data.filter((p) => p.stock > 0).map((p) => p.id));
    cursor = page.data.pagination.next_cursor ?? undefined;
  } while (cursor);

  const sale = await signedIn(login.data.token).POST("/api/v1/transactions", {
    body: { items: [{ product_id: found[0], quantity: 1 }] },
  });
  if (sale.error) throw sale.error;

  const admin = await shop.POST("/api/v1/auth/login", { body: { email, password } });
  if (admin.error) throw admin.error;
  const report = await signedIn(admin.data.token).GET("/api/v1/reports/transactions", {
    params: { query: { start_date: "2026-01-01", end_date: "2199-01-01" } },
  });
  if (report.error || typeof report.data === "string") throw report.error;
  const sold = report.data.data.some((record) => record.transaction_id === sale.data.id);
  console.log(JSON.stringify({ products: found, sold, missing: (await shop.GET(
    "/api/v1/products/{product}", { params: { path: { product: 2 ** 52 } } },
  )).error?.code }));
}

main();
