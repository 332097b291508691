"""``placement dashboard`` as a user sees it: a real cluster, the real command, a real browser."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiohttp import web

import placement
from placement.core.needs import Within
from placement.dashboard import server, source
from placement.errors import ClusterUnreachable
from placement.runtime import bootstrap
from placement.runtime.embedded import SimulatedNode
from tests.dashboard.recorded import Recorded
from tests.dashboard.running import dashboard
from tests.integration.conftest import settled

webdriver = pytest.importorskip(
    "selenium.webdriver", reason="selenium is not installed: pip install selenium"
)
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="there is no browser: apt-get install chromium chromium-driver"
    ),
]

SECONDS = 60.0
HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>{{7*7}}&lt;b&gt;\'"'


@pytest.fixture(scope="module")
def cluster_nodes() -> list[SimulatedNode]:
    return [
        SimulatedNode("pcie", topology="a100-pcie-4x"),
        SimulatedNode("out", resources={"egress_openai": 32}),
    ]


@pytest.fixture(scope="module")
def client(address: str) -> placement.Client:
    return placement.Client.start()


@pytest.fixture(scope="module")
def url(client: placement.Client, address: str) -> Iterator[str]:
    """Where the command says that the page is."""
    with dashboard(address) as found:
        yield found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    offline = "background-networking", "component-update", "sync", "quic", "gpu", "dev-shm-usage"
    for argument in (
        "--headless=new",
        "--no-sandbox",  # CI may be root
        "--no-first-run",
        "--no-proxy-server",
        *(f"--disable-{one}" for one in offline),
        "--window-size=1440,900",
        f"--user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options=options, service=Service(executable_path=DRIVER))
    try:
        yield running
    finally:
        running.quit()


class Page:
    """The page in the browser, as somebody sees it who cannot look into it."""

    def __init__(self, browser: Any, url: str) -> None:
        self.browser = browser
        self.wrong()  # what earlier pages left
        browser.get(url)
        self.await_(lambda: self.text("#service").startswith("live"))

    def text(self, selector: str) -> str:
        script = "return document.querySelector(arguments[0])?.innerText ?? ''"
        return str(self.browser.execute_script(script, selector))

    def label(self, at: int) -> str:
        """What a screen reader says of a GPU of node pcie."""
        return next(one for one in self.labels() if one.startswith(f"GPU {at} of pcie: "))

    def labels(self) -> list[str]:
        script = (
            "return [...document.querySelectorAll('#map .cell')].map(one => one.getAttribute('aria-label'))"
        )
        return list(self.browser.execute_script(script))

    def click(self, selector: str, text: str = "") -> None:
        def tried() -> bool:
            for one in self.browser.find_elements(By.CSS_SELECTOR, selector):
                with contextlib.suppress(StaleElementReferenceException):  # it was drawn anew meanwhile
                    if text in (one.get_attribute("aria-label") or "") + one.text:
                        one.click()
                        return True
            return False

        self.await_(tried)

    def press(self, *keys: str) -> str:
        """What has the focus afterwards: its label or its text."""
        webdriver.ActionChains(self.browser).send_keys(*keys).perform()
        one = self.browser.switch_to.active_element
        return str(one.get_attribute("aria-label") or one.text or one.get_attribute("id"))

    def await_(self, condition: Callable[[], Any]) -> None:
        assert settled(condition, SECONDS), self.text("body")

    def wrong(self) -> list[str]:
        """What the browser complains about."""
        return [one["message"] for one in self.browser.get_log("browser")]


@pytest.fixture
def page(browser: Any, url: str) -> Page:
    return Page(browser, url)


@pytest.fixture
def llama(client: placement.Client) -> Iterator[placement.PlacementResult]:
    result = client.place(
        placement.Deployment(name="llama", model=f"org/{HOSTILE}", gpus=2), wait_seconds=SECONDS
    )
    yield result
    client.release("llama")


def test_what_happens_is_seen_without_a_reload(page: Page, client: placement.Client) -> None:
    assert page.label(0) == "GPU 0 of pcie: free"
    assert page.browser.execute_script("return window.same = true")
    result = client.place(placement.Deployment(name="whisper", model="m", gpus=2), wait_seconds=SECONDS)
    [where] = result.assignments
    page.await_(lambda: page.label(where.gpus[1]) == f"GPU {where.gpus[1]} of pcie: held by whisper/0")
    assert "whisper" in page.text("#deployments") and "230 GB/s, NV12" in page.text("#deployments")
    assert "whisper/0" in page.text("#map .who")
    page.await_(lambda: "placed on pcie GPUs" in page.text("#events"))
    client.release("whisper")
    page.await_(lambda: page.label(where.gpus[1]).endswith("free"))
    assert page.browser.execute_script("return window.same")
    assert page.wrong() == []


def test_what_waits_says_why_and_each_node_is_asked(page: Page, client: placement.Client) -> None:
    client.apply(placement.Deployment(name="large", model="m", gpus=4, within=Within.NVLINK))
    page.await_(lambda: "large" in page.text("#waiting"))
    assert "replica 0 pending" in page.text("#waiting")
    page.click("#waiting button", "large")
    page.click("#detail button", "Ask each node now")
    page.await_(
        lambda: "Nearest miss: pcie has 4 GPUs, but in NVLink islands of 2 + 2" in page.text("#detail")
    )
    assert "within" in page.text("#detail table[aria-label=stages]")
    client.release("large")
    page.await_(lambda: "It is there no longer" in page.text("#detail"))


def test_a_click_shows_replicas_and_what_a_gpu_reports(page: Page, llama: placement.PlacementResult) -> None:
    gpus = llama.assignments[0].gpus
    page.await_(lambda: "llama" in page.text("#deployments"))
    page.click("#deployments button", "llama")
    assert f"GPU {gpus[0]}-{gpus[1]}" in page.text("#detail table[aria-label=replicas]")
    assert "230 GB/s, NV12" in page.text("#detail table[aria-label=replicas]")
    chosen = page.browser.find_elements(By.CSS_SELECTOR, "#map .chosen")
    assert len(chosen) == 2
    page.click("#map .cell", f"GPU {gpus[0]} of pcie")
    page.await_(lambda: "NV12 to" in page.text("#detail"))
    assert "NVIDIA A100 80GB PCIe" in page.text("#detail") and "the catalogue" in page.text("#detail")
    page.click("#map .name", "node pcie")
    page.await_(lambda: "GPU0" in page.text("#detail pre"))


def test_all_of_it_can_be_reached_with_the_keyboard(page: Page, llama: placement.PlacementResult) -> None:
    page.await_(lambda: "llama" in page.text("#deployments"))
    assert page.press(Keys.TAB) == "Skip to the nodes"
    assert page.press(Keys.TAB) == "filter"
    assert page.press(Keys.TAB).startswith("node pcie")
    assert page.press(Keys.ARROW_RIGHT).startswith("GPU 0 of pcie")
    assert page.press(Keys.END).startswith("GPU 3 of pcie")
    assert page.press(Keys.ENTER) == "GPU 3 of pcie", "the title of what it opens"
    assert page.press(Keys.ESCAPE).startswith("GPU 3 of pcie"), "and back"
    assert page.press(Keys.ARROW_DOWN).startswith("node out")
    assert "llama" in page.press(Keys.TAB), "the map is one stop"
    assert page.press("/") == "filter"
    page.press("nothing is like this")
    page.await_(lambda: "0 of 2 nodes, 0 of 1 deployment" in page.text("#found"))


def test_the_policy_lets_nothing_run_but_the_pages_own_script(page: Page) -> None:
    tried = """
        const done = arguments[0], found = new Set();
        document.addEventListener("securitypolicyviolation", (event) => found.add(event.effectiveDirective));
        const attempt = (what) => { try { what(); } catch (error) { found.add(error.name); } };
        attempt(() => { document.querySelector("#found").innerHTML = "<img src=x onerror='window.hacked=1'>"; });
        const script = document.createElement("script");
        attempt(() => { script.append("window.hacked=1"); document.body.append(script); });
        attempt(() => { document.querySelector("#found").setAttribute("style", "color: red"); });
        fetch("https://127.0.0.1:1/").catch(() => {}).then(() => setTimeout(() => done([...found], 300), 300));
    """
    found = page.browser.execute_async_script(tried)
    assert {"TypeError", "require-trusted-types-for", "style-src-attr", "connect-src"} <= {*found}
    assert page.browser.execute_script("return window.hacked") is None


@pytest.fixture
def recorded() -> Iterator[str]:
    """The same page of recorded data, in which every text is hostile."""
    data, ready, found, loop = Recorded(4), threading.Event(), [], asyncio.new_event_loop()
    listener = socket.create_server(("127.0.0.1", 0))

    async def serve() -> None:
        board = server.Board(data)
        runner = web.AppRunner(
            server.application(board, data, server.Guard("127.0.0.1", None)), shutdown_timeout=0.1
        )
        await board.refresh()
        await runner.setup()
        await web.SockSite(runner, listener).start()
        found.append(runner)
        ready.set()

    def run() -> None:
        loop.run_until_complete(serve())
        loop.run_forever()
        loop.run_until_complete(found[0].cleanup())

    read = data.read

    async def hostile(since: int) -> Any:
        told = _hostile(await read(since))
        told["status"]["nodes"][0]["others_unlocated"] = 1  # of the GPUs 5 and 6, which are free else
        return told

    data.read = hostile  # type: ignore[method-assign]
    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(SECONDS)
    yield server.url_of("127.0.0.1", listener.getsockname()[1], None)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


TEXTS = {
    "name",
    "node_name",
    "problem",
    "text",
    "reason",
    "model",
    "gpu_model",
    "resource",
    "runtime",
    "topology",
    "deployment",
}


def _hostile(value: Any, key: str = "") -> Any:
    """The same with markup in each text that people or other programs wrote."""
    if isinstance(value, dict):
        return {each: _hostile(one, each) for each, one in value.items()}
    if isinstance(value, list):
        return [_hostile(one) for one in value]
    return f"{value}{HOSTILE}" if key in TEXTS and isinstance(value, str) else value


def test_no_gpu_looks_free_where_others_hold_one_that_is_not_known(browser: Any, recorded: str) -> None:
    page = Page(browser, recorded)
    said = "free, or one of 1 that other Ray users hold on this node; which is not known yet"
    page.await_(lambda: sum(said in label for label in page.labels()) == 2)
    assert "other Ray users hold 1 more; which ones is not known yet" in page.text("#map")


def test_hostile_texts_are_shown_as_texts(browser: Any, recorded: str) -> None:
    page = Page(browser, recorded)
    for where in ("#map", "#deployments", "#waiting", "#events"):
        page.await_(lambda where=where: HOSTILE in page.text(where))  # type: ignore[misc]
    for one in ("#deployments button", "#events button", "#map .name", "#map .cell", "#waiting button"):
        page.click(one)
        page.await_(lambda: HOSTILE in page.text("#detail"))
    assert (
        page.browser.execute_script("return document.querySelectorAll('img, body script, b b').length") == 0
    )
    assert page.browser.execute_script("return window.hacked") is None
    assert page.wrong() == []


def test_a_hostile_model_is_shown_as_text_from_the_cluster_on(
    page: Page, llama: placement.PlacementResult
) -> None:
    page.await_(lambda: HOSTILE in page.text("#deployments"))
    assert page.browser.execute_script("return window.hacked") is None
    assert page.wrong() == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_who_asks_the_service_may_end_or_hang(
    address: str, how: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        asking = source.ServiceSource(address)
        try:
            before = await asking.read(0)
            child = await asking.start()
            child.send_signal(how)
            with monkeypatch.context() as patched:
                patched.setattr(source, "ANSWER_SECONDS", 3.0)
                with pytest.raises(ClusterUnreachable, match="it is started again|no answer for 3 s"):
                    await asking.read(0)
            assert await asking.start() is not child
            after = await asking.read(0)
            assert [one["name"] for one in before["status"]["nodes"]] == [
                one["name"] for one in after["status"]["nodes"]
            ]
        finally:
            await asking.close()
        assert asking._child is None

    asyncio.run(test())


# The last one: the client of the others is one of the service that ends here.
def test_a_service_that_ends_is_shown_as_gone_and_comes_back(page: Page, client: placement.Client) -> None:
    bootstrap.stop(keep_placements=True)
    page.await_(lambda: "start it with `placement up`" in page.text("#service"))
    assert len(page.labels()) == 4, "what was last known stays"
    placement.start()
    page.await_(lambda: page.text("#service").startswith("live"))
