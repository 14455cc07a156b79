"""The documents for people: the way to them, their page in a real browser, their examples."""
import hashlib
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from blueprints.docs import ASSETS
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


@pytest.mark.parametrize("version", VERSIONS)
def test_the_files_of_the_page_are_asked_for_by_their_content(client, version):
    files = re.findall(r'(?:src|href)="(/docs/([^"?]+)[^"]*)"',
                       client.get(f"/api/{version}/docs").text)
    assert {name for _, name in files} == set(ASSETS)
    for url, name in files:
        with client.get(url) as file:
            assert url == f"/docs/{name}?v={hashlib.sha256(file.data).hexdigest()[:16]}"


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
    """The docs page in a browser: loaded, unless the test before has left it there."""

    def __init__(self, browser, base, version):
        self.browser, self.base, self.version = browser, base, version
        url = f"{base}/api/{version}/docs"
        if browser.current_url.partition("#")[0] != url:
            browser.get(url)
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

    def expand(self, name):
        """The block of an operation, with all that it tells."""
        block = self.find(f"#operations-{name}")
        if not block.find_elements(By.CSS_SELECTOR, ".try-out__btn"):
            self.click(".opblock-summary-control", block)
        return block

    def try_out(self, name, body=None):
        """(status, body text) of an operation, executed on the page."""
        block = self.expand(name)
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


@pytest.fixture(scope="module", params=VERSIONS)
def opened(request, browser, server):
    """A version's page, just loaded, for tests that look at it and do nothing."""
    browser.get_log("browser")
    return Page(browser, server.base, request.param)


def test_the_page_loads_under_its_policy_and_asks_nobody_else(opened):
    asked = opened.requests()
    assert f"{opened.base}/api/{opened.version}/openapi.json" in asked
    assert [url for url in asked if not url.startswith((opened.base, "data:"))] == []
    assert opened.browser.get_log("browser") == []


def test_the_contents_list_the_headings_and_the_groups(opened, client):
    opened.find(".contents a")
    listed = [link.text for link in opened.browser.find_elements(By.CSS_SELECTOR, ".contents a")]
    document = client.get(f"/api/{opened.version}/openapi.json").json
    headings = re.findall("^## (.+)$", document["info"]["description"], re.M)
    assert listed == headings + [tag["name"] for tag in document["tags"]]


def test_the_examples_name_the_address_that_the_page_is_from(opened):
    text = opened.find(".info").text
    assert f"API={opened.base}/api/{opened.version}\n" in text
    assert "localhost" not in text


@pytest.mark.parametrize("version", VERSIONS)
def test_the_policy_lets_the_page_s_own_scripts_in_and_nothing_else(client, version):
    policy = client.get(f"/api/{version}/docs").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy


def test_a_login_on_the_page_signs_the_page_in(browser, server, user):
    page = Page(browser, server.base, "v2")
    assert page.try_out("users-getUser")[0] == 401
    body = {"email": user.email, "password": PASSWORD}
    assert page.try_out("auth-logIn", body)[0] == 200
    WebDriverWait(browser, 10).until(lambda _: page.try_out("users-getUser")[0] == 200)


def test_an_operation_can_be_tried_out_on_the_page(browser, server, make_product):
    product = make_product()
    status, text = Page(browser, server.base, "v1").try_out("products-listProducts")
    assert status == 200
    assert product["name"] in text


def test_the_page_leads_from_one_version_to_the_other(browser, server):
    page = Page(browser, server.base, "v1")
    for version, other in (("v1", "v2"), ("v2", "v1")):
        assert page.find("[aria-current]").text == f"Version {version[1]}"
        page.click(f"[data-for={other}]")
        WebDriverWait(browser, 10).until(lambda _, v=other: v in browser.current_url)
        page.find("#operations-products-listProducts")


@pytest.fixture
def screen(browser):
    """A function that gives the browser a screen of some width, and a taste for dark or light."""
    def show(width=1280, scheme="light"):
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
            {"name": "prefers-color-scheme", "value": scheme}]})
    yield show
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {})


def test_the_page_fits_its_window(browser, server, screen):
    page = Page(browser, server.base, "v1")
    page.expand("products-listProducts")
    for width in (1280, 390):
        screen(width)
        if width < 500:
            page.find(".contents summary").click()
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def place(browser, css):
    """Where the first element of a selector is in the window."""
    return SimpleNamespace(**browser.execute_script(
        "return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", css))


def test_beside_a_wide_text_the_contents_keep_their_place(browser, server, screen):
    screen(1280)
    page = Page(browser, server.base, "v1")
    for target in ("pages", "operations-tag-transactions"):
        page.find(f".contents a[href='#{target}']").click()
        WebDriverWait(browser, 5).until(
            lambda _, target=target: 0 <= place(browser, f"#{target}").top < 40)
    contents = place(browser, ".contents")
    assert contents.top == 0
    assert contents.bottom <= 900
    assert contents.right <= place(browser, "#docs").left
    assert not browser.find_element(By.CSS_SELECTOR, ".contents summary").is_displayed()


def test_on_a_phone_the_contents_open_over_the_text_from_anywhere(browser, server, screen):
    screen(390)
    page = Page(browser, server.base, "v1")
    for target in ("pages", "operations-tag-transactions"):
        browser.execute_script("scrollTo(0, document.body.scrollHeight)")
        link, = browser.find_elements(By.CSS_SELECTOR, f".contents a[href='#{target}']")
        assert not link.is_displayed()
        before = place(browser, "#docs").top
        page.find(".contents summary").click()
        assert link.is_displayed()
        assert place(browser, "#docs").top == before
        link.click()
        bar = place(browser, ".contents").bottom
        WebDriverWait(browser, 5).until(
            lambda _, target=target, bar=bar: bar <= place(browser, f"#{target}").top < bar + 40)
        assert not link.is_displayed()


@pytest.mark.parametrize(("width", "link", "target"), [
    (390, "#retries", "#retries"),
    (1280, "#operations-tag-categories", "#operations-tag-categories"),
    (390, "#/products/createProduct", "#operations-products-createProduct"),
    (1280, "#/products/createProduct", "#operations-products-createProduct"),
])
def test_a_link_into_the_page_leads_there(browser, server, screen, width, link, target):
    screen(width)
    browser.get("about:blank")
    browser.get(f"{server.base}/api/v1/docs{link}")
    WebDriverWait(browser, 20).until(
        lambda _: browser.find_elements(By.CSS_SELECTOR, target)
        and 0 < place(browser, target).top < 80)
    if width < 500:
        assert place(browser, target).top >= place(browser, ".contents").bottom
    assert browser.current_url.endswith(link)


def test_the_page_is_as_dark_as_its_reader_wants(browser, server, screen):
    Page(browser, server.base, "v1").expand("auth-logIn")
    texts = [".contents a", ".swagger-ui .info h2", ".swagger-ui .info pre > code", ".opblock-tag",
             ".opblock-summary-path", "table.headers td"]
    for scheme in ("dark", "light", "dark"):
        screen(scheme=scheme)  # while the page is open
        for css in texts:
            WebDriverWait(browser, 10).until(lambda _, css=css: contrast(browser, css) > 4.5, css)
        assert (luminance(browser, "body", "backgroundColor") < 0.1) == (scheme == "dark")


def luminance(browser, css, of):
    """How light the first element of a selector is (WCAG 2.2), or what shows through it."""
    colour = browser.execute_script("""
        let element = document.querySelector(arguments[0]), colour;
        do colour = getComputedStyle(element)[arguments[1]];
        while (colour == "rgba(0, 0, 0, 0)" && (element = element.parentElement));
        return colour;
    """, css, of)
    shares = [int(share) / 255 for share in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4
                        for share in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(browser, css):
    dark, light = sorted(luminance(browser, css, of) for of in ("color", "backgroundColor"))
    return (light + 0.05) / (dark + 0.05)
