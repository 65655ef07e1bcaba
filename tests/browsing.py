"""What a test in a browser needs: the site, built once; a server; Chromium with the network cut."""

import fcntl, functools, gc, http.server, json, os, shutil, threading
from pathlib import Path

import book_site as site
import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --window-size=1280,1000"
).split()
CHROMIUM, DRIVER = (
    shutil.which(n) or shutil.which(m)
    for n, m in (("chromium", "chromium-browser"), ("chromedriver", "chromium.chromedriver"))
)
browser_only = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)",
)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    "The site, built once, whichever of several workers comes first."
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    docs = folder / "site" / "docs"
    docs.parent.mkdir(exist_ok=True)
    with open(docs.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if not docs.exists():
            site.build(docs, ROOT / "nbs")
            gc.freeze()  # it leaves a million objects that nobody need look through for garbage
        return docs


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *a):
        pass

    def do_GET(self):
        if self.path != FRAMES:
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><link rel=icon href=data:,><title>frames</title><body>")


FRAMES = "/frames"  # a page of the same server with nothing on it, in which others are opened


@pytest.fixture(scope="session")
def address(built):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(built)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.add_experimental_option("perfLoggingPrefs", {"enablePage": False})  # of what happens, what is asked for
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium):
    "A browser whose console must stay empty and which asks nobody but the local server."
    for kind in ("browser", "performance"):
        chromium.get_log(kind)
    yield chromium
    assert complaints(chromium) == [] and asked_elsewhere(chromium) == []


def complaints(browser):
    "What the console says since it was last asked."
    return [e["message"] for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]


def asked_elsewhere(browser):
    "What was asked for that is not on the local server, since this was last looked at."
    asked = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    return [u for u in urls if u.startswith(("http", "ws", "ftp")) and not u.startswith("http://127.0.0.1")]


LETTERS = """
    const letters = (root, scale) => [...root.querySelectorAll('svg[role=img] text')].map(t => {
      const written = [t, ...t.querySelectorAll('tspan')].filter(e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()));
      return Math.max(...written.map(e => parseFloat(e.ownerDocument.defaultView.getComputedStyle(e).fontSize))) * scale(t);
    });"""
MEASURED = (
    LETTERS
    + """
    const [page, widths, done] = arguments;
    const measured = frame => done(widths.map(width => {
      frame.width = width;
      const shown = frame.contentDocument, main = shown.querySelector('main');
      const scale = t => (m => t.getBoundingClientRect().width ? Math.hypot(m.a, m.b) : Infinity)(t.getScreenCTM());
      const least = Math.min(99, ...letters(main, scale));
      return [shown.documentElement.scrollWidth, frame.contentWindow.innerWidth, main.offsetWidth, least];
    }));
    const opened = () => {
      const frame = document.createElement('iframe');
      frame.style = 'border: 0; height: 900px; opacity: 0';
      frame.width = widths[0];
      frame.onload = () => measured(frame);
      frame.src = page;
      return frame;
    };"""
)
OPEN = MEASURED + "document.body.replaceChildren(opened());"
LAY_OUT = (
    MEASURED
    + """
    fetch(page).then(answer => answer.text()).then(async text => {
      const other = new DOMParser().parseFromString(text, 'text/html');
      const asks = [...other.querySelectorAll('script, style, link[rel=stylesheet]')].map(e => e.outerHTML).join();
      const like = [...document.querySelectorAll('iframe')].find(frame => frame.asks == asks);
      if (!like) return document.body.append(Object.assign(opened(), { asks }));
      const shown = like.contentDocument;
      shown.documentElement.lang = other.documentElement.lang;
      shown.body.replaceWith(shown.adoptNode(other.body));
      await Promise.all([...shown.images].map(image => image.decode()));
      measured(like);
    }).catch(error => done(String(error)));"""
)


def open_in_a_frame(browser, address, page, widths, script=OPEN):
    """A page of the site in a frame that is laid out and not painted: two thirds of the work of a window, and the same
    layout. It is made each of the widths in turn, and says how wide its content, its window and its text are then, and
    how many pixels the smallest letter of its figures has."""
    if browser.current_url != address + FRAMES:
        browser.get(address + FRAMES)
    browser.switch_to.default_content()
    return browser.execute_async_script(script, page, widths)


def lay_out_in_a_frame(browser, address, page, widths):
    """The same of a page on which no script has anything to do. One with the same styles and scripts as a page that is in
    a frame takes its place there, which is half the work of opening it."""
    return open_in_a_frame(browser, address, page, widths, LAY_OUT)


def wait(browser, script, *arguments, seconds=5):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds, poll_frequency=0.05).until(lambda b: b.execute_script(script, *arguments))
