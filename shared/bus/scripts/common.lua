-- Shared by every script: loading a request, and the blocks RAISE, REQUEUE, TERM and STALE of
-- docs/protocol.md. KEYS[1] is req:<id>, KEYS[2] its journal log:<id>; the work streams are named
-- in the request and share its hash tag, and so do the channel and the dead-letter stream.
-- Every script that emits calls flush() last, so one call makes one publication a gateway.

local GROUP = 'workers'
local DEAD_LENGTH = 1000
local FIELDS = {'state', 'epoch', 'ev', 'owner', 'stream', 'entry', 'offer', 'address', 'ps', 'ds', 'nc', 'left',
  'chan', 'gw', 'cancel', 'cout', 'ccode', 'cmsg', 'cupto', 'deadline', 'deaths', 'kills', 'died', 'computed', 'bounce',
  'ttl', 'keep', 'usage'}
local NUMBERS = {'epoch', 'ev', 'nc', 'left', 'cupto', 'deadline', 'deaths', 'kills', 'bounce', 'ttl', 'keep'}

local outbox = {}
local clock = nil

local function now()
  if not clock then
    local t = redis.call('TIME')
    clock = tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
  end
  return clock
end

-- The request as a table, or nil when it does not exist. Missing fields are ''.
local function load(key, log)
  local values = redis.call('HMGET', key, unpack(FIELDS))
  if not values[1] then return nil end
  local r = {key = key, log = log, id = string.match(key, '}:req:(.*)$')}
  for i, name in ipairs(FIELDS) do r[name] = values[i] or '' end
  for _, name in ipairs(NUMBERS) do r[name] = tonumber(r[name]) end
  return r
end

local function refresh(r)
  redis.call('PEXPIRE', r.key, r.ttl)
  redis.call('PEXPIRE', r.log, r.ttl)
end

local function remaining(r)
  if r.deadline == 0 then return -1 end
  return math.max(0, r.deadline - now())
end

-- Remove a work entry that was delivered. An undelivered one stays: deleting it would make the
-- group's lag lie, and whoever gets it later finds it stale.
local function drop(stream, id)
  if id ~= '' and redis.call('XACK', stream, GROUP, id) == 1 then redis.call('XDEL', stream, id) end
end

-- Whether a gateway other than this one holds the request and is alive; 1 or 0.
local function is_held_elsewhere(r, gateway)
  local prefix = string.match(r.key, '^(.-}:)req:')
  return r.gw ~= gateway and redis.call('EXISTS', prefix .. 'gw:' .. r.gw) or 0
end

local function is_entry(r, stream, id) return r.entry == id and r.stream == stream end
local function is_offer(r, stream, id) return r.offer == id and r.ds == stream end

-- STALE: true when the entry stands for nothing any more; it is then removed.
local function stale(r, stream, id)
  if r and (is_entry(r, stream, id) or is_offer(r, stream, id)) then return false end
  drop(stream, id)
  return true
end

local function owned(r, epoch, owner)
  return r and r.state ~= 'done' and r.epoch == tonumber(epoch) and r.owner == owner
end

-- Write the journal entry r.epoch-r.ev. False when the journal is gone: then the request is
-- forgotten whole, and its gateway submits it again.
local function journal(r, kind, blob)
  if redis.call('XADD', r.log, 'NOMKSTREAM', r.epoch .. '-' .. r.ev, 'k', kind, 'b', blob) then return true end
  redis.call('DEL', r.key)
  drop(r.stream, r.entry)
  drop(r.ds, r.offer)
  r.state = 'done'
  return false
end

local function emit(r, kind, blob)
  local events = outbox[r.chan]
  if not events then
    events = {}
    outbox[r.chan] = events
  end
  events[#events + 1] = {r.id, r.epoch, r.ev, kind, blob}
end

local function flush()
  for channel, events in pairs(outbox) do redis.call('PUBLISH', channel, cmsgpack.pack(events)) end
end

-- msgpack of a Marker: [tag, version, at, tokens], the last already packed.
local function marker(at, tokens) return '\148' .. cmsgpack.pack('M', 1, at) .. tokens end

-- RAISE: a new epoch, fenced against every earlier owner. False when the request is forgotten.
local function raise(r)
  local names = {}
  for c = 0, r.nc - 1 do names[c + 1] = 'n:' .. c end
  local at = redis.call('HMGET', r.key, unpack(names))
  for i, n in ipairs(at) do at[i] = tonumber(n) end
  r.epoch = r.epoch + 1
  r.ev = 0
  if not journal(r, 'M', marker(at, '\144')) then return false end
  redis.call('HSET', r.key, 'epoch', r.epoch, 'ev', 0)
  refresh(r)
  return true
end

-- REQUEUE: back to the queue under a new work entry; nobody owns it.
local function requeue(r)
  drop(r.stream, r.entry)
  drop(r.ds, r.offer)
  local id = redis.call('XADD', r.ps, '*', 'id', r.id, 'deaths', r.deaths)
  r.state, r.owner, r.stream, r.entry, r.offer, r.bounce = 'queued', '', r.ps, id, '', 0
  redis.call('HSET', r.key, 'state', 'queued', 'owner', '', 'stream', r.ps, 'entry', id, 'offer', '', 'address', '',
    'bounce', 0)
  return id
end

-- The prompt is computed: what kills the worker from here on is not the prompt.
local function note_computed(r)
  if r.state == 'prefill' and r.computed == '' then redis.call('HSET', r.key, 'computed', '1') end
end

-- The request came further than where its worker died: it is no suspect any more.
local function acquit(r)
  if r.deaths > 0 then
    r.deaths = 0
    redis.call('HSET', r.key, 'deaths', 0)
  end
end

-- TERM: the one terminal entry. False when the request is forgotten instead.
local function term(r, outcome, code, message, upto)
  local usage = r.usage ~= '' and r.usage or '\144'
  local blob = '\151' .. cmsgpack.pack('E', 1, outcome, code, message, upto) .. usage
  r.ev = r.ev + 1
  if not journal(r, 'E', blob) then return false end
  redis.call('HSET', r.key, 'ev', r.ev, 'state', 'done', 'owner', '', 'entry', '', 'offer', '', 'address', '')
  drop(r.stream, r.entry)
  drop(r.ds, r.offer)
  redis.call('PEXPIRE', r.key, r.keep)
  redis.call('PEXPIRE', r.log, r.keep)
  r.state, r.owner, r.entry, r.offer = 'done', '', '', ''
  emit(r, 'E', blob)
  return true
end

-- End a request that was cancelled or ran out of time; true when it has ended.
local function ended(r)
  if r.state ~= 'done' then
    if r.cancel == '1' then
      term(r, r.cout, r.ccode, r.cmsg, r.cupto)
    elseif r.deadline > 0 and now() > r.deadline then
      term(r, 'error', 'deadline_exceeded', 'The request ran out of its time budget.', -1)
    end
  end
  return r.state == 'done'
end

local OK, DONE, BEHIND, REFUSED, CANCELLED, CHOICE_ENDED = 0, 1, 2, 3, 4, 5

-- Journal new tokens of one choice if they continue it. Answers a code and, when BEHIND, the
-- length and hash held.
local function extend(r, choice, base, h_base, h, count, finish, blob)
  local held = redis.call('HMGET', r.key, 'n:' .. choice, 'h:' .. choice, 'fin:' .. choice)
  if not held[1] then return REFUSED end
  local n, ended_by = tonumber(held[1]), held[3]
  local is_there = n == base + count and held[2] == h
  if ended_by then return is_there and ended_by == finish and OK or CHOICE_ENDED end
  if n ~= base or held[2] ~= h_base then
    if is_there and finish == '' then return OK end
    return BEHIND, n, held[2]
  end
  if count == 0 and finish == '' then return OK end
  r.ev = r.ev + 1
  if not journal(r, 'T', blob) then return REFUSED end
  redis.call('HSET', r.key, 'ev', r.ev, 'n:' .. choice, n + count, 'h:' .. choice, h)
  if finish ~= '' then
    r.left = r.left - 1
    redis.call('HSET', r.key, 'fin:' .. choice, finish, 'left', r.left)
  end
  emit(r, 'T', blob)
  return OK
end

-- Set the contents of every choice from ARGV[first..]: emax, the token lists packed, then
-- length, hash, finish and finishing event of each choice. RAISEs above emax.
local function rewrite(r, first)
  local at = {}
  for c = 1, r.nc do at[c] = 0 end
  r.epoch = math.max(r.epoch, tonumber(ARGV[first])) + 1
  r.ev = 0
  r.left = r.nc
  if not journal(r, 'M', marker(at, ARGV[first + 1])) then return false end
  for c = 0, r.nc - 1 do
    local a = first + 2 + 4 * c
    redis.call('HSET', r.key, 'n:' .. c, ARGV[a], 'h:' .. c, ARGV[a + 1])
    if ARGV[a + 2] ~= '' then
      r.ev = r.ev + 1
      journal(r, 'T', ARGV[a + 3])
      r.left = r.left - 1
      redis.call('HSET', r.key, 'fin:' .. c, ARGV[a + 2])
    else
      redis.call('HDEL', r.key, 'fin:' .. c)
    end
  end
  redis.call('HSET', r.key, 'epoch', r.epoch, 'ev', r.ev, 'left', r.left)
  refresh(r)
  return true
end

