// The page of serve.py: chat, compare, feedback. Text of models is only ever textContent.
const $ = id => document.getElementById(id)
const store = {
  get: (name, otherwise) => { try { return JSON.parse(localStorage.getItem(name)) ?? otherwise } catch { return otherwise } },
  set: (name, value) => { try { localStorage.setItem(name, JSON.stringify(value)) } catch { /* no room: it lasts until reload */ } },
}
const SETTINGS = ['system', 'temperature', 'top_p', 'max_tokens', 'seed', 'by']
const VOTES = [['left', 'Left is better'], ['right', 'Right is better'], ['tie', 'Tie'], ['both_bad', 'Both are bad']]
// A turn: {question, answers: [{text, model, seed, label, corrected}], vote}; two answers make a comparison
let turns = store.get('turns', []), models = [], keepsFeedback = false, running = null
const comparing = () => location.hash === '#compare'
const visitor = store.get('visitor') ?? `visitor-${crypto.getRandomValues(new Uint32Array(2)).join('')}`
store.set('visitor', visitor)

function el(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties)
  element.append(...children)
  return element
}
function say(text) { $(location.pathname === '/feedback' ? 'report-status' : 'status').textContent = text }

// ---- the server

async function api(path, body, signal) {
  const key = sessionStorage.getItem('key')
  const headers = { ...(key && { authorization: `Bearer ${key}` }), ...(body && { 'content-type': 'application/json' }) }
  const response = await fetch(path, { method: body ? 'POST' : 'GET', headers, body: body && JSON.stringify(body), signal })
  if (response.ok) return response
  if (response.status === 401) $('login').hidden = false
  const problem = await response.json().catch(() => null)
  throw Object.assign(new Error(problem?.error?.message ?? `the server says ${response.status}`), { status: response.status })
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
  for (let rest = '', piece; !(piece = await reader.read()).done;) {
    const parts = (rest + piece.value).split('\n\n')
    rest = parts.pop()
    for (const part of parts) if (part !== 'data: [DONE]') yield JSON.parse(part.slice(6))
  }
}

async function loadModels() {
  const found = await (await api('/v1/models')).json()
  models = found.data.map(m => m.id)
  keepsFeedback = found.feedback
  $('stored').hidden = !keepsFeedback
  const chosen = Math.max(0, $('model').selectedIndex)
  $('model').replaceChildren(...models.map((name, i) => el('option', { textContent: name, value: i })))
  $('model').selectedIndex = Math.min(chosen, models.length - 1)
  $('who').textContent = comparing()
    ? 'Two answers to one question, without names. Which is better?'
    : `${models[$('model').selectedIndex]} answers.`
}

// A vote is kept here until the server has it on its disk
async function judge(entry) {
  store.set('unsent', [...store.get('unsent', []), { ...entry, by: $('by').value || visitor }])
  await sendUnsent()
}
async function sendUnsent() {
  while (store.get('unsent', []).length) {
    const [first, ...rest] = store.get('unsent', [])
    try {
      await api('/v1/feedback', first)
      say('Thank you, it is stored.')
    } catch (e) {
      say(e.status ? `Not stored: ${e.message}` : 'Not stored: the server cannot be reached.')
      // 400 and 409 say that it never will be; all else is kept and sent again
      if (e.status !== 400 && e.status !== 409) return say(`${$('status').textContent} The page keeps it and tries again.`)
    }
    store.set('unsent', rest)
  }
}

// ---- the conversation

const chosenAnswer = turn => turn.answers[turn.vote === 'right' ? 1 : 0]

function messagesBefore(n) {
  const system = $('system').value.trim()
  const messages = system ? [{ role: 'system', content: system }] : []
  for (const turn of turns.slice(0, n)) {
    if (turn.vote === 'both_bad' || !chosenAnswer(turn)?.text.trim()) continue
    messages.push({ role: 'user', content: turn.question }, { role: 'assistant', content: chosenAnswer(turn).corrected ?? chosenAnswer(turn).text })
  }
  return [...messages, { role: 'user', content: turns[n].question }]
}

async function answer(n, two) {
  const turn = turns[n], messages = messagesBefore(n)
  const names = two ? (models.length > 1 ? [...models] : [models[0], models[0]]) : [models[$('model').selectedIndex]]
  if (two && crypto.getRandomValues(new Uint8Array(1))[0] % 2) names.reverse()
  const draw = () => crypto.getRandomValues(new Uint32Array(1))[0]
  const seed = $('seed').value === '' ? draw() : Number($('seed').value) + n
  turn.answers = names.map((model, i) => ({ text: '', model, seed: seed + i }))
  delete turn.vote
  running = new AbortController()
  drawThread()
  say('')
  const settings = { temperature: Number($('temperature').value), top_p: Number($('top_p').value), max_tokens: Number($('max_tokens').value) }
  try {
    await Promise.all(turn.answers.map(async (a, i) => {
      const model = a.model === models[0] ? 'latest' : a.model
      const body = { model, messages, seed: a.seed, stream: true, ...settings }
      for await (const piece of events(await api('/v1/chat/completions', body, running.signal))) {
        if (piece.error) throw new Error(piece.error.message)
        a.model = piece.model
        a.text += piece.choices[0]?.delta.content ?? ''
        document.querySelector(`[data-answer="${n}.${i}"]`).textContent = a.text
        if (innerHeight + scrollY > document.body.scrollHeight - 160) scrollTo(0, document.body.scrollHeight)
      }
    }))
  } catch (e) {
    say(e.name === 'AbortError' ? 'Stopped.' : `No answer: ${e.message}`)
    running.abort()
  }
  running = null
  drawThread()
  if (two) document.querySelector('.votes button')?.focus()
  loadModels().catch(() => {})
}

function vote(n, choice) {
  const turn = turns[n]
  turn.vote = choice
  if (keepsFeedback) {
    const both = name => turn.answers.map(a => a[name])
    judge({ vote: choice, prompt: messagesBefore(n), answers: both('text'), models: both('model'), seeds: both('seed') })
  }
  drawThread()
  $('message').focus()
}

function rate(n, label) {
  const a = turns[n].answers[0]
  a.label = label
  judge({ label, prompt: messagesBefore(n), answer: a.text, model: a.model, seed: a.seed })
  drawThread()
}

function correct(n, text) {
  const a = chosenAnswer(turns[n])
  a.corrected = text
  judge({ correction: text, prompt: messagesBefore(n), answer: a.text, model: a.model, seed: a.seed })
  drawThread()
}

// ---- drawing

const button = (label, onclick, more = {}) => el('button', { type: 'button', textContent: label, onclick, ...more })

function drawAnswer(turn, n, i) {
  const a = turn.answers[i], two = turn.answers.length > 1, shown = !two || turn.vote
  const won = two && turn.vote === ['left', 'right'][i]
  const text = el('p', { className: 'text', textContent: a.text || (running ? '' : '(no answer)') })
  text.dataset.answer = `${n}.${i}`
  const side = two ? `${['Left', 'Right'][i]}${won ? ', preferred' : ''}` : ''
  const box = el('div', { className: `answer${won ? ' won' : ''}` }, el('p', { className: 'quiet', textContent: [side, shown ? a.model : ''].filter(Boolean).join(' · ') }), text)
  if (a.corrected) box.append(el('p', { className: 'quiet', textContent: 'Corrected:' }), el('p', { className: 'text', textContent: a.corrected }))
  return box
}

function drawCorrection(n, item) {
  const area = el('textarea', { rows: 3, value: chosenAnswer(turns[n]).text, ariaLabel: 'The answer you wanted' })
  const form = el('form', {}, area, el('div', { className: 'row' }, el('button', { textContent: 'Store the correction', className: 'main' }), button('Cancel', () => drawThread())))
  form.onsubmit = e => { e.preventDefault(); if (area.value.trim()) correct(n, area.value.trim()) }
  item.append(form)
  area.focus()
}

function drawTurn(turn, n) {
  const last = n === turns.length - 1, two = turn.answers.length > 1, ready = !running && turn.answers.every(a => a.text.trim())
  const item = el('li', {}, el('p', { className: 'question text', textContent: turn.question }))
  item.append(el('div', { className: two ? 'two' : 'one' }, ...turn.answers.map((_, i) => drawAnswer(turn, n, i))))
  if (running) return item
  const tools = el('div', { className: 'row tools' })
  if (two && ready && !turn.vote) {
    const same = turn.answers[0].text.trim() === turn.answers[1].text.trim()
    item.append(el('div', { className: 'row votes', role: 'group', ariaLabel: 'Your vote, keys 1 to 4' }, ...VOTES.map(([choice, label], i) =>
      button(`${i + 1} ${label}`, () => vote(n, choice), { disabled: same && i < 2 }))))
  }
  if (!two && ready && keepsFeedback) tools.append(
    button('👍', () => rate(n, true), { ariaLabel: 'Good answer', ariaPressed: pressed(turn, true), disabled: 'label' in turn.answers[0] }),
    button('👎', () => rate(n, false), { ariaLabel: 'Bad answer', ariaPressed: pressed(turn, false), disabled: 'label' in turn.answers[0] }))
  if (ready && keepsFeedback && (!two || turn.vote)) tools.append(button('Correct', () => drawCorrection(n, item)))
  if (last) tools.append(button('Retry', () => answer(n, two)))
  tools.append(button('Edit', () => { $('message').value = turn.question; turns = turns.slice(0, n); drawThread(); $('message').focus() }))
  item.append(tools)
  return item
}
const pressed = (turn, label) => String(turn.answers[0].label === label)

function drawThread() {
  store.set('turns', turns)
  $('thread').replaceChildren(...turns.map(drawTurn))
  $('send').hidden = Boolean(running)
  $('stop').hidden = !running
}

async function send(event) {
  event?.preventDefault()
  const question = $('message').value.trim()
  if (!question || running) return
  $('message').value = ''
  turns.push({ question, answers: [] })
  await answer(turns.length - 1, comparing())
}

// ---- the feedback page

async function showReport() {
  const r = await (await api('/v1/feedback')).json()
  const names = { pairs: 'One was better', tie: 'Ties', both_bad: 'Both bad', ratings: 'Thumbs', corrections: 'Corrections' }
  $('counts').replaceChildren(...Object.entries(names).map(([kind, label]) => el('div', {}, el('dt', { textContent: label }), el('dd', { textContent: r.counts[kind] ?? 0 }))))
  const rates = Object.entries(r.win_rates).sort((a, b) => b[1].value - a[1].value)
  $('rates').replaceChildren(...rates.map(([model, f]) => {
    const percent = x => `${(100 * x).toFixed(0)} %`
    const bar = el('span', { className: 'bar' }, el('span', { className: 'interval' }), el('span', { className: 'point' }))
    bar.ariaHidden = 'true'
    Object.assign(bar.children[0].style, { left: `${100 * f.low}%`, width: `${100 * (f.high - f.low)}%` })
    bar.children[1].style.left = `${100 * f.value}%`
    return el('li', {}, el('span', { textContent: model }), bar, el('span', { className: 'quiet', textContent: `${percent(f.value)} (${percent(f.low)} to ${percent(f.high)})` }))
  }))
  if (!rates.length) $('rates').replaceChildren(el('li', { className: 'quiet', textContent: 'No two models have met yet.' }))
  $('commands').replaceChildren(...r.commands.map(command => el('div', { className: 'row' }, el('code', { textContent: command }), button('Copy', () => navigator.clipboard.writeText(command).then(() => say('Copied.'))))))
  $('files').replaceChildren(...['pairs', 'ratings', 'corrections', 'ties'].map(kind => button(`${kind}.jsonl`, async () => {
    const url = URL.createObjectURL(await (await api(`/v1/feedback/${kind}.jsonl`)).blob())
    el('a', { href: url, download: `${kind}.jsonl` }).click()
    URL.revokeObjectURL(url)
  })))
  $('newest').replaceChildren(...r.newest.map(row => {
    const said = row.vote?.replace('_', ' ') ?? { pairs: 'preferred', ratings: row.label ? '👍' : '👎', corrections: 'corrected' }[row.kind]
    const prompt = (row.prompt ?? row.messages.slice(0, -1)).at(-1).content
    const text = row.chosen ?? row.completion ?? row.messages?.at(-1).content ?? row.answers.join(' / ')
    const when = new Date(1000 * row.time).toLocaleString()
    return el('li', {}, el('p', { className: 'question text', textContent: prompt }), el('p', { className: 'text', textContent: text }),
      el('p', { className: 'quiet', textContent: `${said} · ${[row.models ?? row.model].flat().join(' over ')} · ${when}` }))
  }))
  if (!r.newest.length) $('newest').replaceChildren(el('li', { className: 'quiet', textContent: 'Nothing yet.' }))
}

// ---- what begins it

function showPage() {
  const page = location.pathname === '/feedback' ? 'feedback' : comparing() ? 'compare' : 'chat'
  for (const name of ['chat', 'compare', 'feedback']) $(`to-${name}`).ariaCurrent = name === page ? 'page' : null
  $('talk').hidden = page === 'feedback'
  $('report').hidden = page !== 'feedback'
  $('talk-title').textContent = page === 'compare' ? 'Compare' : 'Chat'
  document.title = `Feinschliff: ${page}`
}

async function begin() {
  showPage()
  try {
    await loadModels()
    $('login').hidden = true
    if (location.pathname === '/feedback') await showReport()
    else { drawThread(); await sendUnsent(); $('message').focus() }
  } catch (e) { say(e.status === 401 ? '' : `The server cannot be used: ${e.message}`) }
}

$('login').onsubmit = e => { e.preventDefault(); sessionStorage.setItem('key', $('key').value); begin() }
$('composer').onsubmit = send
$('message').onkeydown = e => { if (e.key === 'Enter' && !e.shiftKey && !e.isComposing) send(e) }
$('stop').onclick = () => running?.abort()
$('clear').onclick = () => { running?.abort(); turns = []; drawThread(); say(''); $('message').focus() }
for (const name of SETTINGS) {
  $(name).value = store.get(`set-${name}`, $(name).value)
  $(name).onchange = () => store.set(`set-${name}`, $(name).value)
}
$('model').onchange = () => loadModels().catch(() => {})
onhashchange = () => { showPage(); loadModels().catch(() => {}) }
document.addEventListener('keydown', e => {
  if (e.key === 'Escape') running?.abort()
  if (e.target.closest('textarea, input, select') || e.ctrlKey || e.metaKey || e.altKey) return
  document.querySelectorAll('.votes')[0]?.children[Number(e.key) - 1]?.click()
})
setInterval(() => { if (!document.hidden && !running) loadModels().then(sendUnsent).catch(() => {}) }, 10000)
begin()
