-- sweep: compares that the entry stands for the request, else STALE. Its holder died (counted) or
-- let go. KEYS[3]: work:dead. ARGV: stream, entry id, counted, death limit, bounce limit
local r = load(KEYS[1], KEYS[2])
if stale(r, ARGV[1], ARGV[2]) then return 'stale' end
local counted = ARGV[3] == '1'
if ended(r) then
  flush()
  return 'ended'
end
if is_offer(r, ARGV[1], ARGV[2]) and r.bounce < tonumber(ARGV[5]) then
  local nonce = string.match(r.owner, ':([^:]*)$') or ''
  drop(r.ds, r.offer)
  local id = redis.call('XADD', r.ds, '*', 'id', r.id, 'epoch', r.epoch, 'nonce', nonce, 'address', r.address)
  redis.call('HSET', r.key, 'offer', id, 'bounce', r.bounce + 1)
  refresh(r)
  return 'offered'
end
if counted and r.owner ~= '' then
  r.deaths = r.deaths + 1
  redis.call('HSET', r.key, 'deaths', r.deaths)
end
if r.deaths >= tonumber(ARGV[4]) then
  term(r, 'error', 'request_quarantined', 'The request was given up because its workers kept dying.', -1)
  redis.call('XADD', KEYS[3], 'MAXLEN', '~', DEAD_LENGTH, '*', 'id', r.id, 'reason', 'request_quarantined', 'deaths',
    r.deaths, 'epoch', r.epoch)
  flush()
  return 'dead'
end
if not raise(r) then return 'stale' end
requeue(r)
return 'requeued'
