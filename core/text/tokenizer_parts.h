/// tokenizer_parts.h - what a tokenizer is made of; only tokenizer.c and tokenizer_file.c see
/// inside.
#pragma once
#include "core/text/added.h"
#include "core/text/split.h"
#include "core/text/tokenizer.h"
#include "core/text/vocab.h"

struct cq_tokenizer {
    cq_vocab vocab;
    cq_added added;
    cq_split *split;
    bool nfc;           ///< the normalizer is NFC; else there is none
    bool ignore_merges; ///< a word that is a piece as a whole is taken at once
    char hash[65];
};

/// Fills t from the folder's tokenizer.json and tokenizer_config.json.
int cq_tokenizer_read(cq_tokenizer *t, const char *dir);
