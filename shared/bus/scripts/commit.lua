-- commit: compares epoch, prefill's nonce, state = prefill, offer == id and every hash. Ownership
-- goes from prefill to decode, and the offer becomes the request's entry.
-- ARGV: stream, offer id, epoch, prefill's nonce, new owner, usage, number of events, then seven an
--       event: choice, base, h_base, h, count, finish, blob
local r = load(KEYS[1], KEYS[2])
local stream, id, owner = ARGV[1], ARGV[2], ARGV[5]
if r and r.state == 'decode' and r.owner == owner and is_entry(r, stream, id) then return {'committed'} end
if stale(r, stream, id) then return {'refused'} end
local nonce = string.match(r.owner, ':([^:]*)$')
if not is_offer(r, stream, id) or r.state ~= 'prefill' or r.epoch ~= tonumber(ARGV[3]) or nonce ~= ARGV[4] then
  return {'refused'}
end
if ARGV[6] ~= '' then
  r.usage = ARGV[6]
  redis.call('HSET', r.key, 'usage', r.usage)
end
if ended(r) then
  flush()
  return {'ended'}
end
for i = 1, tonumber(ARGV[7]) do
  local a = 1 + 7 * i
  local code, n, h = extend(r, ARGV[a], tonumber(ARGV[a + 1]), ARGV[a + 2], ARGV[a + 3], tonumber(ARGV[a + 4]),
    ARGV[a + 5], ARGV[a + 6])
  if code == BEHIND or code == REFUSED then
    flush()
    if code == REFUSED then return {'refused'} end
    return {'behind', tonumber(ARGV[a]), n, h}
  end
end
if r.left == 0 then
  term(r, 'finished', '', '', -1)
  flush()
  return {'ended'}
end
drop(r.stream, r.entry)
redis.call('HSET', r.key, 'state', 'decode', 'owner', owner, 'stream', stream, 'entry', id, 'offer', '', 'address', '')
if r.died == 'prefill' then acquit(r) end
refresh(r)
flush()
return {'committed'}
