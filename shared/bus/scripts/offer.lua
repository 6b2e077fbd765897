-- offer: compares epoch, owner and state = prefill. Replaces an earlier offer.
-- ARGV: epoch, owner, nonce, address
local r = load(KEYS[1], KEYS[2])
if not owned(r, ARGV[1], ARGV[2]) or r.state ~= 'prefill' then return {'refused'} end
drop(r.ds, r.offer)
local id = redis.call('XADD', r.ds, '*', 'id', r.id, 'epoch', r.epoch, 'nonce', ARGV[3], 'address', ARGV[4])
redis.call('HSET', r.key, 'offer', id, 'address', ARGV[4])
refresh(r)
return {'offered', id}
