-- append: for each pair of keys, compares epoch, owner, length and hash. Many requests a call. What steady.lua has
-- done already is passed over.
-- ARGV, ten a request: epoch, owner, usage, choice, base, h_base, h, count, finish, blob
local function append(key, log, a)
  local r = load(key, log)
  if not owned(r, ARGV[a], ARGV[a + 1]) then return REFUSED end
  local usage = ARGV[a + 2]
  if usage ~= '' and usage ~= r.usage then
    r.usage = usage
    redis.call('HSET', key, 'usage', usage)
  end
  local before = r.ev
  local code, n, h = extend(r, ARGV[a + 3], tonumber(ARGV[a + 4]), ARGV[a + 5], ARGV[a + 6], tonumber(ARGV[a + 7]),
    ARGV[a + 8], ARGV[a + 9])
  if code == REFUSED then return REFUSED end
  if r.ev > before and tonumber(ARGV[a + 7]) > 0 then
    note_computed(r)
    if r.state == 'decode' then acquit(r) end
  end
  if r.left == 0 then
    term(r, 'finished', '', '', -1)
    return DONE
  end
  if ended(r) then return CANCELLED end
  if r.ev % REFRESH_EVERY == 1 then refresh(r) end
  if code == BEHIND then return {tonumber(ARGV[a + 3]), n, h} end
  return code
end

outbox = steady_outbox
for i = 1, #KEYS / 2 do
  if not answers[i] then answers[i] = append(KEYS[2 * i - 1], KEYS[2 * i], 10 * i - 9) end
end
flush()
return answers
