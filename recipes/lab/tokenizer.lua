-- Trains a byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909) on our own text and writes the two tokenizer files.
--
-- The pieces that merges may not cross are Nemotron's (models.md 6.2), for ASCII: words with one leading mark, single
-- digits, runs of marks. Encoding is the C tokenizer's business; this only finds the merges.
local tokenizer = {}

local special = { "<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<think>", "</think>" }
local pattern = "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+"
  .. "|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*"
  .. "|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

local function utf8(code)
  if code < 128 then return string.char(code) end
  return string.char(192 + math.floor(code / 64), 128 + code % 64)
end

-- GPT-2's printable stand-in for every byte.
local function byte_names()
  local names, extra = {}, 0
  for b = 0, 255 do
    local plain = (b >= 33 and b <= 126) or (b >= 161 and b <= 172) or b >= 174
    names[b] = utf8(plain and b or 256 + extra)
    if not plain then extra = extra + 1 end
  end
  return names
end

local function pieces(text)
  local out, at = {}, 1
  while at <= #text do
    local piece = text:match("^[^%w\r\n]?%u*%l+", at) or text:match("^[^%w\r\n]?%u+%l*", at) or text:match("^%d", at)
      or text:match("^ ?[^%s%w]+[\r\n/]*", at) or text:match("^%s*[\r\n]+", at) or text:match("^%s+", at)
    out[#out + 1] = piece
    at = at + #piece
  end
  return out
end

local function count_pieces(documents, names)
  local counts = {}
  for _, text in ipairs(documents) do
    for part in (text:gsub("<|im_%a+|>", "\0")):gmatch("%Z+") do
      for _, piece in ipairs(pieces(part)) do counts[piece] = (counts[piece] or 0) + 1 end
    end
  end
  local words, order = {}, {}
  for piece in pairs(counts) do order[#order + 1] = piece end
  table.sort(order)
  for i, piece in ipairs(order) do
    local symbols = {}
    for b = 1, #piece do symbols[b] = names[piece:byte(b)] end
    words[i] = { n = counts[piece], symbols = symbols }
  end
  return words
end

-- The most frequent pair; ties go to the one that sorts first, so the result has one value.
local function best_pair(words)
  local counts, best, most = {}, nil, 1
  for _, w in ipairs(words) do
    for i = 1, #w.symbols - 1 do
      local pair = w.symbols[i] .. " " .. w.symbols[i + 1]
      counts[pair] = (counts[pair] or 0) + w.n
    end
  end
  for pair, n in pairs(counts) do
    if n > most or (n == most and best and pair < best) then best, most = pair, n end
  end
  return best
end

local function merge(words, pair)
  local a, b = pair:match("^(%S+) (%S+)$")
  for _, w in ipairs(words) do
    local s, i = w.symbols, 1
    while i < #s do
      if s[i] == a and s[i + 1] == b then
        s[i] = a .. b
        table.remove(s, i + 1)
      end
      i = i + 1
    end
  end
  return a .. b
end

local function quote(text)
  return '"' .. text:gsub('[%c"\\]', function(c)
    return c == '"' and '\\"' or c == "\\" and "\\\\" or ("\\u%04x"):format(c:byte())
  end) .. '"'
end

local function added(i, name, with_id)
  return ('{%s"content": %s, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}'):format(
    with_id and ('"id": %d, '):format(i - 1) or "", quote(name))
end

--- Merges until the vocabulary has `size` entries. Returns the texts of tokenizer.json and tokenizer_config.json.
function tokenizer.train(documents, size)
  local names = byte_names()
  local words = count_pieces(documents, names)
  local vocab, merges = {}, {}
  for i, name in ipairs(special) do vocab[i] = name end
  for b = 0, 255 do vocab[#vocab + 1] = names[b] end
  while #vocab < size do
    local pair = best_pair(words)
    if not pair then break end
    merges[#merges + 1] = quote(pair)
    vocab[#vocab + 1] = merge(words, pair)
  end
  local entries, tokens, decoder = {}, {}, {}
  for i, name in ipairs(vocab) do entries[i] = quote(name) .. ": " .. (i - 1) end
  for i, name in ipairs(special) do
    tokens[i] = added(i, name, true)
    decoder[i] = ('    "%d": %s'):format(i - 1, added(i, name, false))
  end
  local byte_level = '"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false'
  local json = table.concat({
    '{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [\n', table.concat(tokens, ",\n"),
    '],\n"normalizer": null,\n"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": ',
    quote(pattern), '}, "behavior": "Isolated", "invert": false}, {', byte_level, "}]},\n",
    '"post_processor": {', byte_level, '},\n"decoder": {', byte_level, "},\n",
    '"model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, ',
    '"end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,\n"vocab": {',
    table.concat(entries, ", "), '},\n"merges": [', table.concat(merges, ", "), "]}}\n" })
  local config = table.concat({ '{\n  "added_tokens_decoder": {\n', table.concat(decoder, ",\n"),
    '\n  },\n  "bos_token": "<s>",\n  "eos_token": "<|im_end|>",\n  "pad_token": "<pad>",\n  "unk_token": "<unk>",\n',
    '  "clean_up_tokenization_spaces": false,\n  "model_max_length": 4096,\n  "tokenizer_class": "PreTrainedTokenizerFast"\n}\n' })
  return json, config
end

return tokenizer
