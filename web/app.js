// The page of serve.py: chat, compare, feedback. Text of models is only ever textContent.
const $ = id => document.getElementById(id)
const SETTINGS = ['system', 'temperature', 'top_p', 'max_tokens', 'seed', 'by']
const VOTES = [['left', 'Left is better'], ['right', 'Right is better'], ['tie', 'Tie'], ['both_bad', 'Both are bad']]

const kept = {}  // what the browser has no room for lasts until a reload
function recall(name, otherwise, where = 'localStorage') {
  try { return kept[where + name] ?? JSON.parse(window[where].getItem(name)) ?? otherwise } catch { return otherwise }
}
function remember(name, value, where = 'localStorage') {
  delete kept[where + name]
  try { window[where].setItem(name, JSON.stringify(value)) } catch { kept[where + name] = value }
}
const random = () => crypto.getRandomValues(new Uint32Array(1))[0]

// A turn: {question, prompt, answers: [{text, model, seed, whole, label, correction}], vote}; two answers are a
// comparison. Each tab has its own.
let turns = recall('turns', null, 'sessionStorage') ?? recall('turns', [])
let models = [], keepsFeedback = false, running = null
const visitor = recall('visitor', `visitor-${random()}${random()}`)
remember('visitor', visitor)
const onReport = location.pathname === '/feedback'
const comparing = () => !onReport && location.hash === '#compare'

function el(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties)
  element.append(...children)
  return element
}
const quiet = text => el('p', { className: 'quiet', textContent: text })
const button = (label, onclick, more = {}) => el('button', { type: 'button', textContent: label, onclick, ...more })
const say = text => { $(onReport ? 'report-status' : 'status').textContent = text }

// ---- the server

async function api(path, body, signal) {
  const key = recall('key', '', 'sessionStorage'), headers = {}
  if (key) headers.authorization = String.fromCharCode(...new TextEncoder().encode(`Bearer ${key}`))
  if (body) headers['content-type'] = 'application/json'
  const response = await fetch(path, { method: body && 'POST', headers, body: body && JSON.stringify(body), signal })
  if (response.ok) return response
  if (response.status === 401) $('login').hidden = false
  const { error } = await response.json().catch(() => ({}))
  throw Object.assign(new Error(error?.message ?? `the server says ${response.status}`), { status: response.status })
}

// Server-sent events, as objects
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
  let rest = ''
  for (let piece; !(piece = await reader.read()).done;) {
    const parts = (rest + piece.value).split('\n\n')
    rest = parts.pop()
    for (const part of parts) if (part !== 'data: [DONE]') yield JSON.parse(part.slice(6))
  }
}

async function loadModels() {
  const found = await (await api('/v1/models')).json()
  const chosen = Math.max(0, $('model').selectedIndex), before = String(models)
  models = found.data.map(model => model.id)
  keepsFeedback = found.feedback
  $('stored').hidden = !keepsFeedback
  if (String(models) !== before) {  // or somebody may be choosing
    $('model').replaceChildren(...models.map((name, i) => el('option', { textContent: name, value: i })))
    $('model').selectedIndex = Math.min(chosen, models.length - 1)
  }
  $('who').textContent = comparing()
    ? 'Two answers to one question, without names. Which is better?'
    : `${models[$('model').selectedIndex]} answers.`
}

// What is judged is kept here until the server has it on its disk
async function judge(entry) {
  remember('unsent', [...recall('unsent', []), { ...entry, by: $('by').value || visitor }])
  await sendUnsent()
}

async function sendUnsent() {
  while (recall('unsent', []).length) {
    const [first] = recall('unsent', [])
    try {
      await api('/v1/feedback', first)
      say('Thank you, it is stored.')
    } catch (e) {
      const never = [400, 409, 413].includes(e.status)  // what is wrong with it stays wrong
      const reason = e.status ? e.message : 'the server cannot be reached'
      say(`Not stored: ${reason}${never ? '' : '. The page keeps it and tries again.'}`)
      if (!never) return
    }
    remember('unsent', recall('unsent', []).filter(entry => JSON.stringify(entry) !== JSON.stringify(first)))
  }
}

// ---- the conversation

const chosenAnswer = turn => turn.answers[turn.vote === 'right' ? 1 : 0]

// What the model reads before it answers turn n
function messagesBefore(n) {
  const system = $('system').value.trim()
  const messages = system ? [{ role: 'system', content: system }] : []
  for (const turn of turns.slice(0, n)) {
    const answer = chosenAnswer(turn)
    if (!answer?.correction && (turn.vote === 'both_bad' || !answer?.text.trim())) continue
    messages.push({ role: 'user', content: turn.question })
    messages.push({ role: 'assistant', content: answer.correction ?? answer.text })
  }
  return [...messages, { role: 'user', content: turns[n].question }]
}

async function answer(n, two) {
  const turn = turns[n], messages = turn.prompt = messagesBefore(n)
  const seed = $('seed').value === '' ? random() : Number($('seed').value) + n
  const names = two ? [models[0], models.at(-1)] : [models[$('model').selectedIndex]]
  if (two && random() % 2) names.reverse()
  turn.answers = names.map((model, i) => ({ text: '', model, seed: seed + i }))
  delete turn.vote
  running = new AbortController()
  draw()
  say('')
  try {
    await Promise.all(turn.answers.map((_, i) => streamAnswer(turn, n, i, messages, running.signal)))
    say(turn.answers.every(one => one.whole) ? 'The answer is complete.' : 'An answer was cut off.')
  } catch (e) {
    say(e.name === 'AbortError' ? 'Stopped.' : `No answer: ${e.message}`)
    running.abort()
  }
  running = null
  const reads = innerHeight + scrollY > document.body.scrollHeight - 160  // the end, not what is above
  draw()
  if (reads) scrollTo(0, document.body.scrollHeight)
  const first = $('thread').lastChild.querySelector('.votes button:enabled')
  if (!$('message').value) first?.focus({ preventScroll: true })  // not from under somebody who types already
  loadModels().catch(() => {})
}

async function streamAnswer(turn, n, i, messages, signal) {
  const one = turn.answers[i]
  const body = { model: one.model === models[0] ? 'latest' : one.model, messages, seed: one.seed, stream: true }
  for (const name of ['temperature', 'top_p', 'max_tokens']) if ($(name).value) body[name] = Number($(name).value)
  for await (const piece of events(await api('/v1/chat/completions', body, signal))) {
    if (piece.error) throw new Error(piece.error.message)
    one.model = piece.model
    one.text += piece.choices[0]?.delta.content ?? ''
    one.whole = piece.choices[0]?.finish_reason === 'stop'
    document.querySelector(`[data-answer="${n}.${i}"]`).textContent = one.text
    if (innerHeight + scrollY > document.body.scrollHeight - 160) scrollTo(0, document.body.scrollHeight)
  }
}

function vote(n, choice) {
  const turn = turns[n], both = name => turn.answers.map(one => one[name])
  turn.vote = choice
  const answers = { answers: both('text'), models: both('model'), seeds: both('seed') }
  if (keepsFeedback) judge({ vote: choice, prompt: turn.prompt, ...answers })
  draw()
  $('message').focus()
}

function judgeAnswer(n, said) {  // {label} or {correction}
  const { text, model, seed } = Object.assign(chosenAnswer(turns[n]), said)
  judge({ ...said, prompt: turns[n].prompt, answer: text, model, seed })
  draw()
}

function edit(n) {
  $('message').value = turns[n].question
  turns = turns.slice(0, n)
  draw()
  $('message').focus()
}

async function send(event) {
  event?.preventDefault()
  const question = $('message').value.trim()
  if (!question || running) return
  $('message').value = ''
  turns.push({ question, answers: [] })
  await answer(turns.length - 1, comparing())
}

// ---- drawing the conversation

const keepTurns = () => ['localStorage', 'sessionStorage'].forEach(where => remember('turns', turns, where))
function draw() {
  const focused = document.activeElement !== document.body
  keepTurns()
  $('thread').replaceChildren(...turns.map(drawTurn))
  if (focused && document.activeElement === document.body) $('thread').focus({ preventScroll: true })
  $('send').hidden = Boolean(running)
  $('stop').hidden = !running
}

function drawTurn(turn, n) {
  const two = turn.answers.length > 1, answers = turn.answers.map((_, i) => drawAnswer(turn, n, i))
  const item = el('li', {}, el('p', { className: 'question text', textContent: turn.question }))
  item.append(el('div', { className: two ? 'two' : 'one' }, ...answers))
  if (running) return item
  const said = turn.answers.length && turn.answers.every(one => one.text.trim())
  if (two && said && !turn.vote) item.append(drawVotes(turn, n))
  const tools = el('div', { className: 'row tools' })
  if (!two && said && keepsFeedback) tools.append(drawThumb(turn, n, true), drawThumb(turn, n, false))
  if (said && keepsFeedback && (!two || turn.vote)) tools.append(button('Correct', () => drawCorrection(n, item)))
  if (n === turns.length - 1) tools.append(button('Retry', () => answer(n, two)))
  tools.append(button('Edit', () => edit(n)))
  item.append(tools)
  return item
}

function drawAnswer(turn, n, i) {
  const one = turn.answers[i], two = turn.answers.length > 1
  const won = two && turn.vote === ['left', 'right'][i]
  const side = two && `${['Left', 'Right'][i]}${won ? ', preferred' : ''}`
  const name = (!two || turn.vote) && one.model
  const text = el('p', { className: 'text', textContent: one.text || (running ? '' : '(no answer)') })
  text.dataset.answer = `${n}.${i}`
  const above = quiet([side, name, !running && one.text && !one.whole && 'cut off'].filter(Boolean).join(' · '))
  const box = el('div', { className: won ? 'answer won' : 'answer' }, above, text)
  if (one.correction) box.append(quiet('Corrected:'), el('p', { className: 'text', textContent: one.correction }))
  return box
}

function drawVotes(turn, n) {
  const same = turn.answers[0].text.trim() === turn.answers[1].text.trim()
  const buttons = VOTES.map(([choice, label], i) =>  // who learns from an answer that was cut would end there
    button(`${i + 1} ${label}`, () => vote(n, choice), { disabled: i < 2 && (same || !turn.answers[i].whole) }))
  return el('div', { className: 'votes', role: 'group', ariaLabel: 'Your vote, keys 1 to 4' }, ...buttons)
}

function drawThumb(turn, n, label) {
  const { label: given, whole } = turn.answers[0]
  const more = { ariaPressed: String(given === label), disabled: given !== undefined || (label && !whole) }
  return button(label ? 'Good' : 'Bad', () => judgeAnswer(n, { label }), more)
}

function drawCorrection(n, item) {
  const area = el('textarea', { rows: 3, value: chosenAnswer(turns[n]).text, ariaLabel: 'The answer you wanted' })
  const store = el('button', { textContent: 'Store the correction', className: 'main' })
  const form = el('form', {}, area, el('div', { className: 'row' }, store, button('Cancel', draw)))
  form.onsubmit = e => {
    e.preventDefault()
    if (area.value.trim()) judgeAnswer(n, { correction: area.value })
  }
  item.append(form)
  area.focus()
}

// ---- the feedback page

const copy = text => navigator.clipboard.writeText(text).then(() => say('Copied.'))
const percent = x => `${(100 * x).toFixed(0)} %`

async function showReport() {
  const report = await (await api('/v1/feedback')).json()
  const names = { pairs: 'Preferred', tie: 'Ties', both_bad: 'Both bad', ratings: 'Thumbs', corrections: 'Corrected' }
  $('counts').replaceChildren(...Object.entries(names).map(([kind, label]) =>
    el('div', {}, el('dt', { textContent: label }), el('dd', { textContent: report.counts[kind] ?? 0 }))))
  const rates = Object.entries(report.win_rates).sort((a, b) => b[1].value - a[1].value)
  $('rates').replaceChildren(...(rates.length ? rates.map(drawRate) : [quiet('No two models have met yet.')]))
  $('commands').replaceChildren(...report.commands.map(command => el('div', { className: 'row' },
    el('code', { textContent: command }),
    button('Copy', () => copy(command), { hidden: !navigator.clipboard }))))
  $('files').replaceChildren(...['pairs', 'ratings', 'corrections', 'ties'].map(kind =>
    button(`${kind}.jsonl`, () => download(`${kind}.jsonl`).catch(e => say(e.message)))))
  $('newest').replaceChildren(...(report.newest.length ? report.newest.map(drawRow) : [quiet('Nothing yet.')]))
}

function drawRate([model, { value, low, high }]) {
  const interval = el('span', { className: 'interval' }), point = el('span', { className: 'point' })
  Object.assign(interval.style, { left: `${100 * low}%`, width: `${100 * (high - low)}%` })
  point.style.left = `${100 * value}%`
  const bar = el('span', { className: 'bar', ariaHidden: 'true' }, interval, point)
  const text = `${percent(value)} (${percent(low)} to ${percent(high)})`
  return el('li', {}, el('span', { textContent: model }), bar, quiet(text))
}

function drawRow(row) {
  const judged = { pairs: 'preferred', ratings: row.label ? 'good' : 'bad', corrections: 'corrected' }
  const prompt = row.prompt ?? row.messages.slice(0, -1)
  const text = row.chosen ?? row.completion ?? row.messages?.at(-1).content ?? row.answers.join('\n\n')
  const whose = [row.models ?? row.model].flat().join(row.vote ? ' and ' : ' over ')
  const said = [row.vote?.replace('_', ' ') ?? judged[row.kind], whose]
  return el('li', {}, el('p', { className: 'question text', textContent: prompt.at(-1)?.content ?? prompt }),
    el('p', { className: 'text', textContent: text }),
    quiet([...said, row.time && new Date(1000 * row.time).toLocaleString()].filter(Boolean).join(' · ')))
}

async function download(name) {
  const url = URL.createObjectURL(await (await api(`/v1/feedback/${name}`)).blob())
  el('a', { href: url, download: name }).click()
  URL.revokeObjectURL(url)
}

// ---- what begins it

function showPage() {
  const page = onReport ? 'feedback' : comparing() ? 'compare' : 'chat'
  for (const name of ['chat', 'compare', 'feedback']) $(`to-${name}`).ariaCurrent = name === page ? 'page' : null
  $('talk').hidden = onReport
  $('report').hidden = !onReport
  $('talk-title').textContent = page === 'compare' ? 'Compare' : 'Chat'
  document.title = `Feinschliff: ${page}`
}

async function begin() {
  showPage()
  try {
    await loadModels()
    $('login').hidden = true
    say('')
    if (onReport) return await showReport()
    draw()
    await sendUnsent()
    $('message').focus()
  } catch (e) {
    say(`The server cannot be used: ${e.message}`)
  }
}

for (const name of SETTINGS) {
  $(name).value = recall(`set-${name}`, $(name).value)
  $(name).onchange = () => remember(`set-${name}`, $(name).value)
}
$('login').onsubmit = e => {
  e.preventDefault()
  remember('key', $('key').value, 'sessionStorage')
  begin()
}
$('composer').onsubmit = send
$('message').onkeydown = e => { if (e.key === 'Enter' && !e.shiftKey && !e.isComposing) send(e) }
$('stop').onclick = () => running?.abort()
$('clear').onclick = () => {
  if (running) return running.abort()
  turns = []
  draw()
  say('')
  $('message').focus()
}
$('model').onchange = () => loadModels().catch(() => {})
onhashchange = begin
onpagehide = () => { if (running) keepTurns() }
document.addEventListener('keydown', e => {
  if (e.key === 'Escape') running?.abort()
  if (e.target.closest('textarea, input, select') || e.ctrlKey || e.metaKey || e.altKey) return
  const chosen = [...document.querySelectorAll('.votes')].at(-1)?.children[Number(e.key) - 1]
  if (chosen) e.preventDefault()  // the vote moves the focus, and the digit would be typed there
  chosen?.click()
})
setInterval(() => {
  if (!document.hidden && !running && !onReport) loadModels().then(sendUnsent).catch(() => {})
}, 10000)
begin()
