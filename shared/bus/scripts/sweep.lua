-- sweep: compares that the entry stands for the request, else STALE. Its holder is gone or does not want it.
-- KEYS[3]: work:dead. ARGV: stream, entry id, why ('died': the holder is gone; 'failed': it could not handle the
--       request; 'let_go': neither), death limit, kill limit, bounce limit
local QUARANTINED = 'request_quarantined'

local r = load(KEYS[1], KEYS[2])
local stream, id, why = ARGV[1], ARGV[2], ARGV[3]
local max_deaths, max_kills, max_bounces = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])

local function offer_again()
  local nonce = string.match(r.owner, ':([^:]*)$') or ''
  drop(r.ds, r.offer)
  local offer = redis.call('XADD', r.ds, '*', 'id', r.id, 'epoch', r.epoch, 'nonce', nonce, 'address', r.address)
  redis.call('HSET', r.key, 'offer', offer, 'bounce', r.bounce + 1)
  refresh(r)
end

-- A kill is charged for the death of any holder; a death, which makes a suspect, only where the request was owned: not to who
-- held an offer, and not to prefill once the prompt was computed.
local function charge(offered)
  local charged = why == 'failed' or (why == 'died' and r.owner ~= '')
  if not charged then return end
  local role = offered and 'decode' or r.state
  r.kills = (r.kills or 0) + 1
  if why == 'failed' or not offered and (role == 'decode' or r.computed == '') then r.deaths = r.deaths + 1 end
  redis.call('HSET', r.key, 'deaths', r.deaths, 'kills', r.kills, 'died', role)
  r.died = role
end

local function num_tokens()
  local sum = 0
  for c = 0, r.nc - 1 do sum = sum + tonumber(redis.call('HGET', r.key, 'n:' .. c)) end
  return sum
end

local function model()
  return (string.gsub(string.match(r.ps, ':work:prefill:(.*)$') or '', '#express$', ''))
end

local function quarantine()
  local prompt, tokens = redis.call('HGET', r.key, 'plen') or '', num_tokens()
  if not term(r, 'error', QUARANTINED, 'The request was given up because its workers kept dying.', -1) then return end
  redis.call('XADD', KEYS[3], 'MAXLEN', '~', DEAD_LENGTH, '*', 'id', r.id, 'reason', QUARANTINED, 'deaths', r.deaths,
    'kills', r.kills, 'epoch', r.epoch, 'model', model(), 'role', r.died,
    'prompt', prompt, 'tokens', tokens, 'time', now(), 'gateway', r.gw)
end

if stale(r, stream, id) then return 'stale' end
if ended(r) then
  flush()
  return 'ended'
end
local offered = is_offer(r, stream, id)
local bounces = offered and r.bounce < max_bounces
if not (bounces and why == 'failed') then charge(offered) end
if r.deaths >= max_deaths or (r.kills or 0) >= max_kills then
  quarantine()
  flush()
  return 'dead'
end
if bounces then
  offer_again()
  return 'offered'
end
if not raise(r) then return 'stale' end
requeue(r)
return 'requeued'
