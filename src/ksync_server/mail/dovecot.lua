-- Dovecot asks ksync-server who may open which mailbox. Written by `ksync-server mail dovecot-config`.
--
-- One question is one connection to a Unix socket: words in hexadecimal, one line there, one line back.
-- Nothing is remembered here: a revoked device password is refused at its next log-in. Dovecot 2.3 and 2.4.

local unix = require "socket.unix"

local SOCKET = "$socket"
local PATIENCE_S = $patience_s

local function to_hex(text)
  return (text:gsub(".", function(byte) return ("%02x"):format(byte:byte()) end))
end

local function from_hex(text)
  return (text:gsub("%x%x", function(pair) return string.char(tonumber(pair, 16)) end))
end

-- The verdict ("ok", "no", or nil where there is none) and what is known of the mailbox.
local function ask(request, verb, ...)
  local words = { verb }
  for _, word in ipairs({ ... }) do
    words[#words + 1] = to_hex(word)
  end
  local connection = assert(unix())
  connection:settimeout(PATIENCE_S)
  local sent, problem = connection:connect(SOCKET)
  local line
  if sent then
    sent, problem = connection:send(table.concat(words, " ") .. "\n")
  end
  if sent then
    line, problem = connection:receive("*l")
  end
  connection:close()
  if not line then
    request:log_error("ksync-server does not answer at " .. SOCKET .. ": " .. tostring(problem))
    return nil, {}
  end
  local fields = {}
  for name, value in line:gmatch(" ([%w_]+)=(%x*)") do
    fields[name] = from_hex(value)
  end
  return line:match("^%a+"), fields
end

-- What Dovecot is to know of a mailbox, each name after a prefix.
local function known(found, prefix)
  local answer = { user = found.user }
  for _, name in ipairs({ "home", "uid", "gid", "$quota" }) do
    answer[prefix .. name] = found[name]
  end
  return answer
end

function auth_password_verify(request, password)
  local service = request.protocol or request.service -- as 2.4 and 2.3 call it
  local verdict, found = ask(
    request, "login", service or "", request.remote_ip or "", request.user or "", password
  )
  if verdict == "ok" then
    return dovecot.auth.PASSDB_RESULT_OK, known(found, "userdb_")
  elseif verdict == "no" then
    return dovecot.auth.PASSDB_RESULT_PASSWORD_MISMATCH, "refused"
  end
  return dovecot.auth.PASSDB_RESULT_INTERNAL_FAILURE, "told to come back"
end

-- For Dovecot's own programs, which open a mailbox without a log-in.
function auth_userdb_lookup(request)
  local verdict, found = ask(request, "find", request.user or "")
  if verdict == "ok" then
    return dovecot.auth.USERDB_RESULT_OK, known(found, "")
  elseif verdict == "no" then
    return dovecot.auth.USERDB_RESULT_USER_UNKNOWN, "no such mailbox"
  end
  return dovecot.auth.USERDB_RESULT_INTERNAL_FAILURE, "told to come back"
end
