-- poll: keeps a request alive for its gateway, ends it when overdue, and reads its journal. For anybody else it only
--       reads.
-- ARGV: gateway, id of the last entry known or ''
-- Answers state, epoch, the gateway that holds it, the journal, and whether that is another one that is alive
local r = load(KEYS[1], KEYS[2])
if not r then return {'gone'} end
if r.state ~= 'done' and r.gw == ARGV[1] then
  refresh(r)
  if r.deadline > 0 then ended(r) end
end
flush()
local from = ARGV[2] ~= '' and '(' .. ARGV[2] or '-'
return {'live', r.state, r.epoch, r.gw, redis.call('XRANGE', r.log, from, '+'), is_held_elsewhere(r, ARGV[1])}
