"""The documents for people: the way to them, their page in a real browser, their examples."""
import json
import re
import shutil
import subprocess

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.conftest import PASSWORD

VERSIONS = ["v1", "v2"]
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-dev-shm-usage", "--window-size=1280,1000"]


def test_the_root_leads_a_browser_to_the_docs(client):
    response = client.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert (response.status_code, response.headers["Location"]) == (302, "/api/v1/docs")


def test_the_root_gives_a_program_the_links(client):
    for accept in ("application/json", "*/*", None):
        response = client.get("/", headers={"Accept": accept} if accept else {})
        for links in response.json["versions"].values():
            assert client.get(links["openapi"]).json["openapi"] == "3.1.0"
            assert client.get(links["docs"]).status_code == 200
        assert client.get(response.json["health"]).status_code == 200


def test_the_introduction_names_the_demo_accounts_in_development_only(app, make_app):
    live = make_app(APP_ENV="production")
    for version in VERSIONS:
        assert b"admin@example.com" in app.extensions["documents"][version]
        assert b"admin@example.com" not in live.extensions["documents"][version]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_introduction_s_examples_run(version, client, server, make_product, tmp_path):
    for _ in range(3):
        make_product()
    text = client.get(f"/api/{version}/openapi.json").json["info"]["description"]
    script = "\necho\n".join(re.findall(r"```sh\n(.*?)```", text, re.S))
    script = script.replace("http://localhost:8000", server.base)
    done = subprocess.run(["bash", "-e", "-o", "pipefail", "-c", script], cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = iter(done.stdout.splitlines())
    for word in ('"name":"Ada"' if version == "v1" else '"name" : "Ada"', '"refresh_token"',
                 '"validation_failed"', '"next_cursor"', '"completed"', "304",
                 '"precondition_failed"', "RateLimit-Policy"):
        assert any(word in line for line in told), f"{word} is missing in {done.stdout}"


# One browser for all of them, on one worker.
in_browser = pytest.mark.xdist_group("browser")


@pytest.fixture(scope="module")
def browser():
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("Chromium and its driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    for flag in FLAGS:
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


class Page:
    """The docs page in a browser."""

    def __init__(self, browser, base, version):
        self.browser, self.base = browser, base
        browser.get(f"{base}/api/{version}/docs")
        self.find(".opblock")

    def find(self, css, within=None):
        """The first element of a selector, as soon as there is one to be seen."""
        def visible(_):
            found = (within or self.browser).find_elements(By.CSS_SELECTOR, css)
            return next((element for element in found if element.is_displayed()), None)
        return WebDriverWait(self.browser, 20, 0.05).until(visible, f"no {css}")

    def click(self, css, within=None):
        element = self.find(css, within)
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        self.browser.execute_script("arguments[0].click()", element)

    def try_out(self, name, body=None):
        """(status, body text) of an operation, executed on the page."""
        block = self.find(f"#operations-{name}")
        if not block.find_elements(By.CSS_SELECTOR, ".try-out__btn"):
            self.click(".opblock-summary-control", block)
        if not block.find_elements(By.CSS_SELECTOR, ".execute"):
            self.click(".try-out__btn", block)
        if body is not None:
            self.browser.execute_script("""
                const area = arguments[0];
                Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, "value").set.call(
                    area, arguments[1]);
                area.dispatchEvent(new Event("input", {bubbles: true}));
            """, self.find("textarea", block), json.dumps(body))
        self.click(".execute", block)
        answer = self.find(".live-responses-table .response", block)
        return int(self.find(".response-col_status", answer).text.split()[0]), answer.text

    def requests(self):
        """The URLs of all that the browser has asked for since the last time."""
        events = [json.loads(entry["message"])["message"]
                  for entry in self.browser.get_log("performance")]
        return [event["params"]["request"]["url"] for event in events
                if event["method"] == "Network.requestWillBeSent"]


@in_browser
@pytest.mark.parametrize("version", VERSIONS)
def test_the_page_loads_under_its_policy_and_asks_nobody_else(browser, server, version):
    browser.get_log("browser")
    page = Page(browser, server.base, version)
    asked = page.requests()
    assert f"{server.base}/api/{version}/openapi.json" in asked
    assert [url for url in asked if not url.startswith((server.base, "data:"))] == []
    assert browser.get_log("browser") == []
    policy = server.call("GET", f"/api/{version}/docs").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy


@in_browser
@pytest.mark.parametrize("version", VERSIONS)
def test_an_operation_can_be_tried_out_on_the_page(browser, server, make_product, version):
    product = make_product()
    status, text = Page(browser, server.base, version).try_out("products-listProducts")
    assert status == 200
    assert product["name"] in text


@in_browser
@pytest.mark.parametrize("version", VERSIONS)
def test_a_login_on_the_page_signs_the_page_in(browser, server, user, version):
    page = Page(browser, server.base, version)
    assert page.try_out("users-getUser")[0] == 401
    body = {"email": user.email, "password": PASSWORD}
    assert page.try_out("auth-logIn", body)[0] == 200
    WebDriverWait(browser, 10).until(lambda _: page.try_out("users-getUser")[0] == 200)


@in_browser
def test_the_page_leads_from_one_version_to_the_other(browser, server):
    page = Page(browser, server.base, "v1")
    for version, other in (("v1", "v2"), ("v2", "v1")):
        assert page.find("[aria-current]").text == f"Version {version[1]}"
        page.click(f"[data-for={other}]")
        WebDriverWait(browser, 10).until(lambda _, v=other: v in browser.current_url)
        page.find("#operations-products-listProducts")


@in_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_window(browser, server, width):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500})
    try:
        Page(browser, server.base, "v1").click("#operations-products-listProducts button")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
