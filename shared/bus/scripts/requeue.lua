-- requeue: compares epoch and owner. The owner gives the request back; no death is counted.
-- ARGV: epoch, owner
local r = load(KEYS[1], KEYS[2])
if not owned(r, ARGV[1], ARGV[2]) then return 'refused' end
if ended(r) then
  flush()
  return 'requeued'
end
if not raise(r) then return 'refused' end
requeue(r)
return 'requeued'
