-- touch: compares epoch and owner. Ends a cancelled or overdue request.
-- ARGV: epoch, owner, whether prefill has computed the whole prompt. Answers owner?, cancelled?, is the offer
--       standing?, remaining ms, the gateway that holds the request now
local r = load(KEYS[1], KEYS[2])
if not owned(r, ARGV[1], ARGV[2]) then return {0, 0, 0, -1, ''} end
if ended(r) then
  flush()
  return {0, 1, 0, -1, r.gw}
end
refresh(r)
if ARGV[3] == '1' then note_computed(r) end
local offer_live = r.offer ~= '' and #redis.call('XRANGE', r.ds, r.offer, r.offer) == 1
return {1, 0, offer_live and 1 or 0, remaining(r), r.gw}
