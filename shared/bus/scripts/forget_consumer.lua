-- forget_consumer: compares that a dead consumer holds nothing, since deleting one with pending
-- entries would lose them. KEYS[1]: stream. ARGV: consumer
if #redis.call('XPENDING', KEYS[1], GROUP, '-', '+', 1, ARGV[1]) > 0 then return 0 end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], GROUP, ARGV[1])
return 1
