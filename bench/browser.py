"""The page of serve.py in a real browser: headless Chromium, through playwright.

A server with two tiny models is started: one answers "hi" with markup that would run if the page
took it for markup, one never ends. Somebody asks, streams, stops, compares, votes by key, corrects,
loses the server's disk for a while, reloads, and meets a new checkpoint. Nothing may be logged as
an error, and axe-core, if --axe names it, may find no serious fault. Screenshots at 1280 and 390
pixels, light and dark, lie in --out, to be looked at.

    pip install -e '.[browser]'; apt-get install chromium; npm install axe-core
    python -m bench.browser --axe=node_modules/axe-core/axe.min.js
"""

import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch

from data import chat, tokenizer
from data.rows import message
from model import GPT, GPTConfig, completion_logprobs
from optim import Optimizer
from runtime import checkpoint
from runtime.errors import UserError
from runtime.process import launch

MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>"
SMALL = {"vocab_size": 260, "layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn": 64}


@dataclass
class Config:
    # directory for the screenshots
    out: str = "out/browser"
    # the browser; "": chromium, wherever it is
    chromium: str = ""
    # axe.min.js of axe-core; "": accessibility is not checked
    axe: str = ""
    # a run of sft.py in the quick start's world; with it the picture of docs/story.md is drawn
    model: str = ""


# --------------------------------------------------------------------------------------------------
# Models and a server


def teach(run, answers, step=1, **info):
    """Save a tiny model that knows {message: answer} by heart."""
    model, tok = GPT(GPTConfig(**SMALL, context=256)).init_weights(0), tokenizer.byte_level()
    optimizer = Optimizer(model, 0.01)
    chats = [chat.encode(tok, [message("user", q), message("assistant", a)]) for q, a in answers.items()]
    for _ in range(120):
        loss = completion_logprobs(model, chats).mean().neg()
        loss.backward()
        optimizer.step(1.0)
        if loss < 0.01:
            break
    return checkpoint.save(run, model, tok, {"stage": "sft", "step": step, "total_steps": step, **info})


def endless(run):
    """Save a model that says x for ever."""
    model = GPT(GPTConfig(**SMALL, context=4000)).init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.embed.fill_(1.0)
        model.norm.fill_(1.0)
        model.untied_head[ord("x")] = 5.0
    return checkpoint.save(run, model, tokenizer.byte_level(), {"stage": "sft", "step": 1})


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_server(**flags):
    """(process, address) of a serve.py that answers."""
    address = f"http://127.0.0.1:{flags.setdefault('port', free_port())}"
    command = [sys.executable, "serve.py", *(f"--{name}={value}" for name, value in flags.items())]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1])
    try:
        wait_until_it_answers(process, address)
    except BaseException:
        process.kill()
        raise
    return process, address


def wait_until_it_answers(process, address):
    for _ in range(6000):  # a busy machine takes a minute to import torch
        try:
            return urllib.request.urlopen(f"{address}/", timeout=5).read()
        except OSError:
            if process.poll() is not None:
                raise UserError("serve.py has ended; what it printed says why") from None
            time.sleep(0.05)
    raise UserError("serve.py does not answer")


# --------------------------------------------------------------------------------------------------
# Somebody at the page


def expect(true, what):
    if not true:
        raise UserError(f"the page: {what}")


def wait(page, true):
    """Wait until a JavaScript expression holds; the page's policy forbids playwright's own way."""
    for _ in range(1500):
        if page.evaluate(f"() => {true}"):
            return
        page.wait_for_timeout(20)
    raise UserError(f"the page: never came true: {true}")


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ask(page, text):
    """Ask with the keyboard alone, and wait for the whole answer."""
    page.focus("#message")
    page.keyboard.type(text)
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:not([hidden])")


def check_chat(page, address):
    page.goto(address)
    wait(page, "document.activeElement.id == 'message'")
    page.evaluate("temperature.value = 0, temperature.dispatchEvent(new Event('change'))")  # kept by the page
    ask(page, "hi")
    expect(page.inner_text(".answer .text") == MARKUP, "the answer is not shown as text")
    expect(page.inner_text("#status") == "The answer is complete.", "the end of an answer is not said")
    expect(page.locator("#thread script, #thread img").count() == 0, "text of a model became markup")
    page.click("summary")
    page.select_option("#model", "1")
    page.fill("#max_tokens", "3000")
    page.focus("#message")
    page.keyboard.type("go on")
    page.keyboard.press("Enter")
    wait(page, "[...document.querySelectorAll('.answer .text')].at(-1).textContent.length > 5")
    page.keyboard.press("Escape")
    wait(page, "document.getElementById('status').textContent == 'Stopped.'")
    text = page.locator(".answer .text").last.inner_text()
    expect(set(text) == {"x"} and len(text) < 3000, "a stopped answer is not what had come")
    page.focus("#message")
    page.keyboard.type("go on")
    page.keyboard.press("Enter")
    wait(page, "[...document.querySelectorAll('.answer .text')].at(-1).textContent.length > 5")
    page.reload()
    wait(page, "document.activeElement.id == 'message'")
    expect(set(page.locator(".answer .text").last.inner_text()) == {"x"}, "a reload in mid-answer loses what had come")
    page.click("summary")
    page.fill("#max_tokens", "60")
    page.click("summary")


def check_votes(page, feedback):
    page.click("#to-compare")
    page.click("#clear")
    # somebody types the next question while the answers come
    page.evaluate("max_tokens.value = 600")
    page.focus("#message")
    page.keyboard.type("hi")
    page.keyboard.press("Enter")
    page.keyboard.type("hi")
    page.wait_for_selector("#send:not([hidden])")
    expect(
        page.evaluate("document.activeElement.id") == "message", "the end of an answer takes the focus from a typist"
    )
    page.evaluate("max_tokens.value = 60, message.value = ''")
    page.click("#clear")
    ask(page, "hi")
    expect("step_" not in page.inner_text("#thread"), "a comparison shows the models before the vote")
    texts = page.locator(".answer .text").all_inner_texts()
    cut = [set(text) == {"x"} for text in texts]  # it never ends
    enabled = page.locator(".votes button").evaluate_all("all => all.map(button => !button.disabled)")
    expect(enabled == [not cut[0], not cut[1], True, True], "an answer that was cut can be preferred")
    page.evaluate("system.value = 'This comes after the answers.'")
    page.keyboard.press(str(1 + cut.index(False)))
    wait(page, "document.getElementById('status').textContent.includes('stored')")
    page.evaluate("system.value = ''")
    (row,) = rows_of(feedback / "pairs.jsonl")
    expect(row["chosen"] == texts[cut.index(False)], "the vote is not what was chosen")
    expect(len(set(row["models"])) == 2, "the two answers are of one model")
    expect(row["prompt"] == [message("user", "hi")], "the prompt of a vote is not what the models read")
    expect("step_" in page.inner_text("#thread"), "the models stay hidden after the vote")
    expect(page.input_value("#message") == "", "the digit of a vote is typed into the next message")
    ask(page, "hi")  # waits for its vote: a key votes on the newest
    # the disk is full for a while
    page.route("**/v1/feedback", lambda route: route.fulfill(status=507, body='{"error": {"message": "full"}}'))
    page.fill("#message", "hi")
    page.keyboard.press("Enter")
    page.wait_for_selector(".votes")
    page.keyboard.press("4")
    wait(page, "document.getElementById('status').textContent.includes('keeps it')")
    expect(page.locator("#thread > li:last-child .votes").count() == 0, "a key votes on an older question")
    page.unroute("**/v1/feedback")
    page.reload()
    wait(page, "document.getElementById('status').textContent.includes('stored')")
    expect(rows_of(feedback / "ties.jsonl")[0]["vote"] == "both_bad", "a vote kept by the page was not sent again")
    expect(page.locator("#thread > li").count() == 3, "the conversation does not survive a reload")
    # both were bad, but somebody has written a better one
    correct(page, "Yes!")
    expect(page.evaluate("document.activeElement.id") == "thread", "the focus is lost with the form")
    page.evaluate("max_tokens.value = 60")
    ask(page, "hi")
    page.keyboard.press("4")
    wait_for_rows(page, feedback / "ties.jsonl", 2)
    said = rows_of(feedback / "ties.jsonl")[1]["prompt"][-2]
    expect(said == message("assistant", "Yes!"), "the correction of two bad answers is not read by the next one")


def correct(page, text):
    page.locator("button:text-is('Correct')").last.click()
    page.fill("[aria-label='The answer you wanted']", text)
    page.click("text=Store the correction")
    page.wait_for_selector("text=Corrected:")


def wait_for_rows(page, path, n):
    for _ in range(500):
        if len(rows_of(path)) >= n:
            return
        page.wait_for_timeout(20)
    raise UserError(f"the page: {path.name} never has {n} rows")


def check_rating_and_correction(page, address, feedback):
    page.goto(address)
    page.click("#clear")
    page.click("summary")
    page.select_option("#model", "0")
    ask(page, "hi")
    page.click("text=Good")
    wait(page, "document.getElementById('status').textContent.includes('stored')")
    correct(page, "Hello!")
    wait_for_rows(page, feedback / "corrections.jsonl", 2)
    expect(rows_of(feedback / "ratings.jsonl")[0]["label"] is True, "the thumb was not stored")
    expect(rows_of(feedback / "corrections.jsonl")[1]["messages"][-1]["content"] == "Hello!", "no correction stored")


def check_follow(page, rounds):
    teach(rounds / "1" / "dpo", {"hi": "I am new."})
    wait(page, "document.getElementById('who').textContent.includes('rounds')")
    page.click("#clear")
    ask(page, "hi")
    expect(page.inner_text(".answer .text") == "I am new.", "the new checkpoint does not answer")


def check_report(page, address):
    page.goto(f"{address}/feedback")
    page.wait_for_selector("#counts dd")
    found = dict(re.findall(r"(.+)\n+(\d+)", page.inner_text("#counts")))
    expected = {"Preferred": "1", "Ties": "0", "Both bad": "2", "Thumbs": "1", "Corrected": "2"}
    expect(found == expected, f"the counts are {found}")
    expect(page.locator("#rates .bar").count() == 2, "no win rates")
    with page.expect_download() as download:
        page.click("text=pairs.jsonl")
    expect(len(rows_of(Path(download.value.path()))) == 1, "the download is not the file")


FORBIDDEN = "for (const name of ['localStorage', 'sessionStorage']) Object.defineProperty(window, name, "
FORBIDDEN += "{ get() { throw new DOMException('forbidden', 'SecurityError') } })"
FULL = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') }"


def check_without_storage(browser, address, feedback):
    """A browser that stores nothing loses no vote."""
    for script in (FORBIDDEN, FULL):
        stored = len(rows_of(feedback / "ratings.jsonl"))
        context = browser.new_context()
        context.add_init_script(script)
        page = context.new_page()
        page.goto(address)
        wait(page, "document.activeElement.id == 'message'")
        ask(page, "hi")
        page.click("text=Bad")
        wait(page, "document.getElementById('status').textContent.includes('stored')")
        expect(len(rows_of(feedback / "ratings.jsonl")) == stored + 1, "a vote is lost without storage")
        context.close()


def check_two_tabs_and_a_key(browser, model, folder):
    """A key may have any letters; each tab keeps its conversation, and no vote is lost."""
    server, address = start_server(model=model, feedback=folder / "tabs", device="cpu", api_key="ключ é")
    try:
        context = browser.new_context()
        tabs = [context.new_page(), context.new_page()]
        for page, questions in zip(tabs, (1, 2)):
            page.goto(address)
            page.wait_for_selector("#login:not([hidden])")
            for key in ("wrong", "ключ é"):
                page.fill("#key", key)
                page.keyboard.press("Enter")
                said = "document.getElementById('status').textContent.includes('key')"
                wait(page, said if key == "wrong" else f"!{said}")
            page.wait_for_selector("#login", state="hidden")
            page.click("#clear")
            for _ in range(questions):
                ask(page, "hi")
            page.route("**/v1/feedback", lambda route: route.abort())
            page.locator("text=Bad").last.click()  # the server cannot be reached
            wait(page, "document.getElementById('status').textContent.includes('keeps it')")
        for page, questions in zip(tabs, (1, 2)):
            page.unroute("**/v1/feedback")
            page.reload()
            wait(page, "!JSON.parse(localStorage.unsent).length")
            expect(page.locator("#thread > li").count() == questions, "a tab has another tab's conversation")
        expect(len(rows_of(folder / "tabs/ratings.jsonl")) == 2, "a vote of two tabs is lost")
        context.close()
    finally:
        server.terminate()
        server.wait()


def check_accessibility(page, axe):
    """Have axe-core look at the page as it is."""
    page.evaluate(Path(axe).read_text())
    for fault in page.evaluate("axe.run()")["violations"]:
        expect(fault["impact"] not in ("serious", "critical"), f"axe-core: {fault['id']}: {fault['help']}")


def watch(page, problems):
    """Note errors on the console, except those that the page is made to meet, and dialogs."""
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" and "507" not in m.text else None)
    page.on("pageerror", lambda e: problems.append(str(e)))
    page.on("dialog", lambda dialog: (problems.append("a dialog: a model's text has run"), dialog.dismiss()))


def screenshots(browser, address, out, axe):
    """Pictures of the three pages, each at two widths, light and dark."""
    for width, height in ((1280, 800), (390, 844)):
        for scheme in ("light", "dark"):
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            page, problems = context.new_page(), []
            watch(page, problems)
            for name in ("", "#compare", "feedback"):
                page.goto(f"{address}/{name}")
                page.reload()
                if name == "feedback":
                    page.wait_for_selector("#counts dd")
                else:
                    wait(page, "document.activeElement.id == 'message'")
                    page.evaluate("document.getElementById('max_tokens').value = 60")
                    ask(
                        page, "hi" if name else "What does the page do with a longer question, of two lines on a phone?"
                    )
                    ask(page, "hi") if not name else None
                page.screenshot(path=out / f"{name.strip('#') or 'chat'}_{width}_{scheme}.png")
                wide = page.evaluate("document.documentElement.scrollWidth > innerWidth")
                expect(not wide, f"{name or 'chat'} scrolls sideways at {width} pixels")
                if axe:
                    check_accessibility(page, axe)
            expect(not problems, f"errors in the browser: {problems}")
            context.close()


def picture(browser, model, folder, file):
    """The compare view before the vote, with a model of the embedded world."""
    server, address = start_server(model=Path(model).resolve(), feedback=folder / "picture", device="cpu")
    try:
        page = browser.new_page(viewport={"width": 1000, "height": 640}, device_scale_factor=1.5)
        page.goto(f"{address}/#compare")
        wait(page, "document.activeElement.id == 'message'")
        page.evaluate("document.getElementById('seed').value = 4")
        ask(page, "What do the red kite for 25 and the soft coat for 49 cost together?")
        page.screenshot(path=file)
    finally:
        server.terminate()
        server.wait()


def check(folder, out, chromium="", axe="", pictures=True, model=""):
    """Everything, with models and votes in `folder`; raises UserError naming what is wrong.

    pictures: whether the pages are looked at in all sizes and colours.
    """
    from playwright.sync_api import sync_playwright

    out.mkdir(parents=True, exist_ok=True)
    teach(folder / "knows", {"hi": MARKUP})
    endless(folder / "endless")
    feedback, rounds = folder / "feedback", folder / "rounds"
    models = {"model": folder / "knows", "compare": folder / "endless"}
    server, address = start_server(**models, feedback=feedback, follow=rounds, device="cpu")
    try:
        with sync_playwright() as playwright:
            path = chromium or shutil.which("chromium") or shutil.which("chromium-browser")
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            page, problems = browser.new_page(), []
            watch(page, problems)
            check_chat(page, address)
            check_votes(page, feedback)
            check_rating_and_correction(page, address, feedback)
            check_follow(page, rounds)
            check_report(page, address)
            check_without_storage(browser, address, feedback)
            check_two_tabs_and_a_key(browser, folder / "knows", folder)
            expect(not problems, f"errors in the browser: {problems}")
            if pictures:
                screenshots(browser, address, out, axe)
            if model:
                picture(browser, model, folder, out / "compare.png")
            browser.close()
    finally:
        server.terminate()
        server.wait()


def main(config):
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder), Path(config.out), config.chromium, config.axe, model=config.model)
    print(f"the page works; screenshots in {config.out}")


if __name__ == "__main__":
    launch(main, Config)
