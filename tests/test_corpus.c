/// test_corpus.c - JSONL lines to ids and masks, the held-out split, packing, and printing with the
/// mask.
#include "core/base/error.h"
#include "core/base/file.h"
#include "core/base/rng.h"
#include "core/text/corpus.h"
#include "core/text/show.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define OK(call) cr_assert_eq((call), CQ_OK, "%s: %s", #call, cq_error())

static const char *const models[] = {"nemotron_h_gsm8k", "qwen3_gsm8k"};
static const cq_template templates[] = {CQ_TEMPLATE_NANO3, CQ_TEMPLATE_QWEN3_THINKING};

static cq_tokenizer *open_model(const char *model) {
    char dir[512];
    snprintf(dir, sizeof dir, "%s/golden/%s", CQ_TESTS, model);
    cq_tokenizer *t = NULL;
    OK(cq_tokenizer_open(&t, dir));
    return t;
}

static cq_corpus_options options(cq_template chat, cq_mask mask) {
    return (cq_corpus_options){.chat = chat, .mask = mask, .vocab = 1024, .max_tokens = 4096};
}

/// Opens a corpus of these lines; *path names the file, which is gone afterwards.
static int open_lines(cq_corpus **c, const char *lines, const cq_tokenizer *t,
                      const cq_corpus_options *o, char *path) {
    strcpy(path, "/tmp/cq_corpus_XXXXXX");
    int fd = mkstemp(path);
    cr_assert_geq(fd, 0);
    close(fd);
    OK(cq_file_write(path, lines, (int64_t)strlen(lines)));
    int status = cq_corpus_open(c, path, t, o);
    unlink(path);
    return status;
}

static cq_corpus *open_text(const char *lines, const cq_tokenizer *t, const cq_corpus_options *o) {
    cq_corpus *c = NULL;
    char path[64];
    OK(open_lines(&c, lines, t, o, path));
    return c;
}

static void expect_show(const cq_corpus *c, const cq_tokenizer *t, int64_t doc,
                        const char *wanted) {
    char *text;
    OK(cq_corpus_show(c, t, doc, false, &text));
    cr_expect_str_eq(text, wanted);
    free(text);
}

Test(corpus, every_kind_of_line_gives_its_text_and_targets) {
    static const char lines[] = "\xEF\xBB\xBF{\"text\": "
                                "\"<|im_start|>user\\nq<|im_end|>\\n<|im_start|>assistant\\n<think>"
                                "\\nr\\n</think>\\na<|im_end|>\\n"
                                "<|im_start|>user\\nz<|im_end|>\"}\n"
                                "\n"
                                "{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, "
                                "{\"role\": \"assistant\", \"content\": \"a\"}]}\r\n"
                                "{\"prompt\": \"q\", \"completion\": \"a\"}\n"
                                "{\"prompt\": [{\"role\": \"assistant\", \"content\": \"old\"}, "
                                "{\"role\": \"user\", \"content\": \"q\"}], "
                                "\"completion\": [{\"role\": \"assistant\", \"content\": \"a\"}]}\n"
                                "{\"input_ids\": [5, 6, 7], \"labels\": [-100, -100, 7]}";
    cq_tokenizer *t = open_model("nemotron_h_gsm8k");
    cq_corpus_options o = options(CQ_TEMPLATE_NANO3, CQ_MASK_ASSISTANT);
    cq_corpus *c = open_text(lines, t, &o);
    cr_assert_eq(cq_corpus_count(c), 5);
    expect_show(c, t, 0,
                "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n[[r\n</"
                "think>\na<|im_end|>]]\n"
                "<|im_start|>user\nz<|im_end|>");
    expect_show(c, t, 1,
                "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>"
                "assistant\n<think></think>"
                "[[a<|im_end|>]]\n");
    expect_show(c, t, 2,
                "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>"
                "assistant\n<think></think>"
                "[[a<|im_end|>]]\n");
    expect_show(c, t, 3,
                "<|im_start|>system\n<|im_end|>\n<|im_start|>assistant\n<think></"
                "think>old<|im_end|>\n<|im_start|>user\nq"
                "<|im_end|>\n<|im_start|>assistant\n<think></think>[[a<|im_end|>]]\n");
    expect_show(c, NULL, 4, "5 6 [[7]]");
    cq_corpus_close(c);
    o.mask = CQ_MASK_ALL;
    o.chat = CQ_TEMPLATE_NONE;
    c = open_text(
        "{\"prompt\": \"q\", \"completion\": \"a\"}\n{\"input_ids\": [5, 6]}\n{\"text\": \"x\"}\n",
        t, &o);
    expect_show(c, t, 0, "q[[a]]"); // the first token has nothing that predicts it
    const int32_t *ids;
    const uint8_t *mask;
    int64_t n;
    OK(cq_corpus_doc(c, 1, &ids, &mask, &n));
    cr_expect(n == 2 && ids[0] == 5 && ids[1] == 6 && mask[0] == 1 && mask[1] == 1);
    cq_corpus_close(c);
    cq_tokenizer_close(t);
}

/// Qwen3 renders an empty thought as "<think>\n\n</think>": the opening ends inside the token
/// "\n\n", which is no target.
Test(corpus, a_token_that_straddles_the_prompt_is_no_target) {
    cq_tokenizer *t = open_model("qwen3_gsm8k");
    cq_corpus_options o = options(CQ_TEMPLATE_QWEN3_THINKING, CQ_MASK_ASSISTANT);
    cq_corpus *c = open_text("{\"prompt\": \"q\", \"completion\": \"a\"}\n", t, &o);
    char *text;
    OK(cq_corpus_show(c, t, 0, false, &text));
    cr_expect(strstr(text, "</think>\n\na<|im_end|>]]\n"), "%s", text);
    cr_expect_null(strstr(text, "[[<think>"), "%s", text);
    free(text);
    cq_corpus_close(c);
    cq_tokenizer_close(t);
}

/// Tokens of the parts put together are the tokens of the whole, because spans begin and end at
/// special tokens.
Test(corpus, targets_are_the_tokens_of_the_span_alone) {
    static const char line[] =
        "{\"messages\": [{\"role\": \"user\", \"content\": \"How many e\xCC\x81 in "
        "caf\xC3\xA9?\"}, {\"role\": \"assistant\", "
        "\"content\": \"Two e\xCC\x81, I think: 1+1 = 2.\", \"reasoning_content\": \"count\"}]}";
    for (int m = 0; m < 2; m++) {
        cq_tokenizer *t = open_model(models[m]);
        cq_corpus_options o = options(templates[m], CQ_MASK_ASSISTANT);
        cq_corpus *c = open_text(line, t, &o);
        char *text;
        cq_span *spans;
        int64_t bytes, n_spans, n, n_alone;
        OK(cq_template_render(templates[m], line, &text, &bytes, &spans, &n_spans));
        cr_assert_eq(n_spans, 1);
        int32_t *alone;
        OK(cq_tokenizer_encode(t, text + spans[0].begin, spans[0].end - spans[0].begin, &alone,
                               &n_alone));
        const int32_t *ids;
        const uint8_t *mask;
        OK(cq_corpus_doc(c, 0, &ids, &mask, &n));
        int64_t k = 0;
        for (int64_t i = 0; i < n; i++)
            if (mask[i]) {
                cr_expect(k < n_alone && ids[i] == alone[k], "%s: target %lld", models[m],
                          (long long)k);
                k++;
            }
        cr_expect_eq(k, n_alone, "%s: %lld targets, wanted %lld", models[m], (long long)k,
                     (long long)n_alone);
        free(text);
        free(spans);
        free(alone);
        cq_corpus_close(c);
        cq_tokenizer_close(t);
    }
}

Test(corpus, errors_name_the_file_the_line_and_what_was_wanted) {
    static const struct {
        const char *lines, *named;
        cq_mask mask;
    } cases[] = {
        {"{\"text\": \"x\"}\n\n{\"text\": \n", ":3: broken JSON", CQ_MASK_ALL},
        {"[1]\n", ":1: no JSON object", CQ_MASK_ALL},
        {"{\"text\": \"x\"}\n{\"texts\": \"x\"}\n", ":2: no known key", CQ_MASK_ALL},
        {"{\"text\": 5}\n", ":1: text", CQ_MASK_ALL},
        {"{\"text\": \"\"}\n", ":1: an empty document", CQ_MASK_ALL},
        {"{\"input_ids\": []}\n", ":1: an empty document", CQ_MASK_ALL},
        {"{\"prompt\": \"x\"}\n", ":1: prompt and completion", CQ_MASK_ALL},
        {"{\"completion\": \"x\"}\n", ":1: prompt and completion", CQ_MASK_ALL},
        {"{\"messages\": []}\n", ":1: messages: an empty list", CQ_MASK_ALL},
        {"{\"input_ids\": [1]}\n{\"input_ids\": [1, 2, 5000]}\n",
         ":2: token id 5000 at position 2, wanted below 1024", CQ_MASK_ALL},
        {"{\"input_ids\": [-1]}\n", ":1: token id -1 at position 0", CQ_MASK_ALL},
        {"{\"input_ids\": [1.5]}\n", ":1: input_ids", CQ_MASK_ALL},
        {"{\"input_ids\": [1, 2], \"labels\": [1]}\n", ":1: labels: 1 of them", CQ_MASK_ALL},
        {"{\"input_ids\": [1, 2], \"labels\": [-100, 3]}\n",
         ":1: labels: 3 at position 1, wanted 2", CQ_MASK_ALL},
        {"{\"input_ids\": [1, 2]}\n", "without labels", CQ_MASK_ASSISTANT},
        {"{\"text\": \"no turns\"}\n", ":1: no assistant turn", CQ_MASK_ASSISTANT},
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}]}\n", ":1: no assistant turn",
         CQ_MASK_ASSISTANT},
        {"", ": no documents", CQ_MASK_ALL},
        {"\n \n", ": no documents", CQ_MASK_ALL}};
    cq_tokenizer *t = open_model("nemotron_h_gsm8k");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        cq_corpus *c = NULL;
        char path[64], wanted[256];
        cq_corpus_options o = options(CQ_TEMPLATE_NANO3, cases[i].mask);
        cr_expect_eq(open_lines(&c, cases[i].lines, t, &o, path), CQ_EDATA, "%s", cases[i].lines);
        snprintf(wanted, sizeof wanted, "%s%s", cases[i].named[0] == ':' ? path : "",
                 cases[i].named);
        cr_expect(strstr(cq_error(), wanted), "%s: \"%s\", wanted \"%s\"", cases[i].lines,
                  cq_error(), wanted);
        cr_expect_null(c);
    }
    cq_corpus *c = NULL;
    cq_corpus_options o = options(CQ_TEMPLATE_NONE, CQ_MASK_ALL);
    char path[64];
    cr_expect_eq(open_lines(&c, "{\"messages\": [{\"role\": \"user\"}]}", t, &o, path), CQ_EDATA);
    cr_expect(strstr(cq_error(), "--template"), "%s", cq_error());
    cr_expect_eq(open_lines(&c, "{\"text\": \"x\"}", NULL, &o, path), CQ_EDATA);
    cr_expect(strstr(cq_error(), "tokenizer"), "%s", cq_error());
    cr_expect_eq(cq_corpus_open(&c, "/no/such/file.jsonl", t, &o), CQ_EDATA);
    cr_expect(strstr(cq_error(), "/no/such/file.jsonl"), "%s", cq_error());
    cr_expect_eq(cq_corpus_open(&c, "/tmp", t, &o), CQ_EIO, "a folder is no file");
    cr_expect_eq(cq_corpus_open(&c, "a,,b", t, &o), CQ_EDATA, "the first path is tried first");
    cr_expect_eq(cq_corpus_open(&c, "", t, &o), CQ_EUSAGE);
    cq_tokenizer_close(t);
}

Test(corpus, long_documents_are_cut_and_counted) {
    cq_corpus_options o = options(CQ_TEMPLATE_NONE, CQ_MASK_ALL);
    o.max_tokens = 3;
    cq_corpus *c = open_text(
        "{\"input_ids\": [1, 2, 3]}\n{\"input_ids\": [1, 2, 3, 4, 5]}\n{\"input_ids\": [9]}\n",
        NULL, &o);
    const int32_t *ids;
    const uint8_t *mask;
    int64_t n;
    cr_expect_eq(cq_corpus_truncated(c), 1);
    cr_expect_eq(cq_corpus_tokens(c), 7);
    OK(cq_corpus_doc(c, 1, &ids, &mask, &n));
    cr_expect(n == 3 && ids[2] == 3);
    cr_expect_eq(cq_corpus_doc(c, 3, &ids, &mask, &n), CQ_EUSAGE);
    cr_expect_eq(cq_corpus_doc(c, -1, &ids, &mask, &n), CQ_EUSAGE);
    cq_corpus_close(c);
    // what is cut off is checked all the same
    char path[64];
    cr_expect_eq(open_lines(&c, "{\"input_ids\": [1, 2, 3, 4000]}", NULL, &o, path), CQ_EDATA);
}

Test(corpus, the_hash_sees_ids_masks_and_boundaries) {
    static const char *const lines[] = {
        "{\"input_ids\": [1, 2, 3]}", "{\"input_ids\": [1, 2]}\n{\"input_ids\": [3]}",
        "{\"input_ids\": [1, 2, 4]}", "{\"input_ids\": [1, 2, 3], \"labels\": [1, -100, 3]}"};
    char hash[4][65];
    cq_corpus_options o = options(CQ_TEMPLATE_NONE, CQ_MASK_ALL);
    for (int i = 0; i < 4; i++) {
        cq_corpus *c = open_text(lines[i], NULL, &o);
        strcpy(hash[i], cq_corpus_hash(c));
        cr_expect_eq(strlen(hash[i]), 64);
        for (int k = 0; k < i; k++)
            cr_expect_str_neq(hash[i], hash[k], "%d and %d", i, k);
        cq_corpus_close(c);
    }
}

Test(corpus, gsm8k_is_read_whole_with_the_answers_as_targets) {
    for (int m = 0; m < 2; m++) {
        cq_tokenizer *t = open_model(models[m]);
        cq_corpus_options o = options(templates[m], CQ_MASK_ASSISTANT);
        cq_corpus *c = NULL;
        OK(cq_corpus_open(
            &c, CQ_TESTS "/data/gsm8k_train.jsonl, " CQ_TESTS "/data/gsm8k_test.jsonl", t, &o));
        cr_expect_eq(cq_corpus_count(c), 2400);
        cr_expect_eq(cq_corpus_truncated(c), 0);
        int32_t end = cq_tokenizer_id(t, "<|im_end|>");
        for (int64_t i = 0; i < cq_corpus_count(c); i++) {
            const int32_t *ids;
            const uint8_t *mask;
            int64_t n, first = 0;
            OK(cq_corpus_doc(c, i, &ids, &mask, &n));
            while (first < n && !mask[first])
                first++;
            cr_expect(first > 0 && first < n && ids[n - 1] == end && mask[n - 1],
                      "%s: document %lld", models[m], (long long)i);
            for (int64_t k = first; k < n; k++)
                cr_expect(mask[k], "%s: document %lld token %lld", models[m], (long long)i,
                          (long long)k);
        }
        cq_corpus_close(c);
        cq_tokenizer_close(t);
    }
}

/// n documents of seeded lengths 1 to longest; document i is all token i, so a batch shows which
/// documents it holds.
static cq_corpus *make_corpus(int64_t n, int64_t longest, uint64_t seed) {
    char *lines = malloc((size_t)(n * (longest * 5 + 32))), *at = lines;
    for (int64_t i = 0; i < n; i++) {
        int64_t length = 1 + cq_random_below(seed, 1, (uint64_t)i, longest);
        at += sprintf(at, "{\"input_ids\": [");
        for (int64_t k = 0; k < length; k++)
            at += sprintf(at, k ? ",%lld" : "%lld", (long long)i);
        at += sprintf(at, "]}\n");
    }
    cq_corpus_options o = options(CQ_TEMPLATE_NONE, CQ_MASK_ALL);
    cq_corpus *c = open_text(lines, NULL, &o);
    free(lines);
    return c;
}

Test(corpus, the_held_out_split_is_disjoint_complete_and_seeded) {
    int taken[3][100];
    memset(taken, 0, sizeof taken);
    for (int run = 0; run < 3; run++) {
        cq_corpus *c = make_corpus(100, 5, 1), *held = NULL;
        int64_t tokens = cq_corpus_tokens(c);
        char whole[65];
        strcpy(whole, cq_corpus_hash(c));
        OK(cq_corpus_hold_out(c, 0.1, run == 2 ? 8 : 7, &held));
        cr_expect_eq(cq_corpus_count(held), 10);
        cr_expect_eq(cq_corpus_count(c), 90);
        cr_expect_eq(cq_corpus_tokens(held) + cq_corpus_tokens(c), tokens);
        cr_expect_str_neq(cq_corpus_hash(c), whole);
        int seen[100] = {0};
        for (int side = 0; side < 2; side++)
            for (int64_t i = 0; i < cq_corpus_count(side ? held : c); i++) {
                const int32_t *ids;
                const uint8_t *mask;
                int64_t n;
                OK(cq_corpus_doc(side ? held : c, i, &ids, &mask, &n));
                seen[ids[0]]++;
                taken[run][ids[0]] += side;
            }
        for (int i = 0; i < 100; i++)
            cr_expect_eq(seen[i], 1, "document %d is on %d sides", i, seen[i]);
        cq_corpus_close(c);
        cq_corpus_close(held);
    }
    cr_expect(memcmp(taken[0], taken[1], sizeof taken[0]) == 0,
              "the same seed gives the same split");
    cr_expect(memcmp(taken[0], taken[2], sizeof taken[0]) != 0, "another seed gives another split");
}

Test(corpus, the_held_out_split_takes_at_least_one_and_at_most_half) {
    static const struct {
        int64_t n, held;
        double fraction;
    } cases[] = {{2, 1, 0.001}, {3, 1, 0.9}, {10, 5, 1}, {10, 1, 0}, {10, 2, 0.2}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        cq_corpus *c = make_corpus(cases[i].n, 3, 2), *held = NULL;
        OK(cq_corpus_hold_out(c, cases[i].fraction, 1, &held));
        cr_expect_eq(cq_corpus_count(held), cases[i].held, "case %zu", i);
        cq_corpus_close(held);
        cr_expect_eq(cq_corpus_hold_out(c, -1, 1, &held),
                     cq_corpus_count(c) < 2 ? CQ_EDATA : CQ_EUSAGE);
        cq_corpus_close(c);
    }
    cq_corpus *c = make_corpus(1, 3, 2), *held = NULL;
    cr_expect_eq(cq_corpus_hold_out(c, 0.5, 1, &held), CQ_EDATA);
    cr_expect_null(held);
    cq_corpus_close(c);
}

/// Checks one micro-batch against the corpus and appends its documents to `order`.
static void check_batch(const cq_corpus *c, const cq_batch *b, int64_t room, int64_t *order,
                        int64_t *n_order) {
    int64_t valid = 0;
    cr_assert(b->tokens >= 1 && b->tokens <= room && b->starts[0] == 0 &&
              b->starts[b->n_docs] == b->tokens);
    for (int64_t d = 0; d < b->n_docs; d++) {
        const int32_t *ids;
        const uint8_t *mask;
        int64_t n;
        OK(cq_corpus_doc(c, b->doc[d], &ids, &mask, &n));
        cr_assert_eq(b->starts[d + 1] - b->starts[d], n, "a document is whole");
        for (int64_t i = 0; i < n; i++) {
            int64_t at = b->starts[d] + i;
            cr_assert_eq(b->ids[at], ids[i]);
            cr_assert_eq(b->positions[at], i);
            cr_assert_eq(b->labels[at], i + 1 < n && mask[i + 1] ? ids[i + 1] : -100);
            valid += b->labels[at] >= 0;
        }
        order[(*n_order)++] = b->doc[d];
    }
    cr_assert_eq(b->valid, valid);
}

enum { DOCS = 97, LONGEST = 20 };

Test(loader, three_epochs_lose_and_repeat_nothing) {
    static const cq_loader_options cases[] = {
        {.seq = LONGEST, .batch = 1, .micro = 1},
        {.seq = LONGEST, .batch = 4, .micro = 2, .shuffle = true},
        {.seq = 33, .batch = 3, .micro = 1, .shuffle = true, .seed = 5},
        {.seq = 64, .batch = 4, .micro = 4, .shuffle = true, .seed = 6},
        {.seq = 5000, .batch = 1, .micro = 1}};
    cq_corpus *c = make_corpus(DOCS, LONGEST, 3);
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        cq_loader *l = NULL;
        static int64_t order[100000];
        int64_t n_order = 0, n;
        const cq_batch *b;
        OK(cq_loader_open(&l, c, &cases[k]));
        while (n_order < 3 * DOCS) {
            OK(cq_loader_next(l, &b, &n));
            cr_assert_eq(n, cases[k].batch / cases[k].micro, "case %zu", k);
            for (int64_t i = 0; i < n; i++) {
                int64_t before = n_order;
                check_batch(c, &b[i], cases[k].micro * cases[k].seq, order, &n_order);
                cr_assert_gt(n_order, before);
            }
            cr_assert_eq(cq_loader_position(l), n_order);
        }
        for (int epoch = 0; epoch < 3; epoch++) {
            int seen[DOCS] = {0};
            for (int64_t i = 0; i < DOCS; i++) {
                int64_t doc = order[epoch * DOCS + i];
                seen[doc]++;
                cr_expect(cases[k].shuffle || doc == i, "case %zu: file order", k);
            }
            for (int i = 0; i < DOCS; i++)
                cr_expect_eq(seen[i], 1, "case %zu epoch %d: document %d came %d times", k, epoch,
                             i, seen[i]);
        }
        if (cases[k].shuffle)
            cr_expect(memcmp(order, order + DOCS, DOCS * sizeof *order) != 0,
                      "case %zu: a new order every epoch", k);
        cq_loader_close(l);
    }
    cq_corpus_close(c);
}

/// Packing is greedy: a micro-batch only ends because the next document would not fit.
Test(loader, a_micro_batch_is_as_full_as_order_allows) {
    cq_corpus *c = make_corpus(DOCS, LONGEST, 4);
    cq_loader_options o = {.seq = 40, .batch = 2, .micro = 1};
    cq_loader *l = NULL;
    OK(cq_loader_open(&l, c, &o));
    for (int step = 0; step < 50; step++) {
        const cq_batch *b;
        const int32_t *ids;
        const uint8_t *mask;
        int64_t n, next;
        OK(cq_loader_next(l, &b, &n));
        OK(cq_corpus_doc(c, cq_loader_position(l) % DOCS, &ids, &mask, &next));
        cr_expect_gt(b[1].tokens + next, 40);
        OK(cq_corpus_doc(c, b[1].doc[0], &ids, &mask, &next));
        cr_expect_gt(b[0].tokens + next, 40);
    }
    cq_loader_close(l);
    cq_corpus_close(c);
}

Test(loader, one_epoch_ends_after_every_document) {
    cq_corpus *c = make_corpus(DOCS, LONGEST, 5);
    cq_loader_options o = {
        .seq = LONGEST, .batch = 8, .micro = 1, .shuffle = true, .once = true, .seed = 9};
    cq_loader *l = NULL;
    int64_t order[DOCS + 1], n_order = 0, n = -1;
    OK(cq_loader_open(&l, c, &o));
    for (int step = 0; n != 0; step++) {
        const cq_batch *b;
        cr_assert_lt(step, DOCS);
        OK(cq_loader_next(l, &b, &n));
        for (int64_t i = 0; i < n; i++)
            check_batch(c, &b[i], LONGEST, order, &n_order);
    }
    cr_expect_eq(n_order, DOCS);
    cr_expect_eq(cq_loader_seek(l, DOCS + 1), CQ_EUSAGE);
    OK(cq_loader_seek(l, DOCS - 1));
    const cq_batch *b;
    OK(cq_loader_next(l, &b, &n));
    cr_expect(n == 1 && b[0].n_docs == 1 && b[0].doc[0] == order[DOCS - 1]);
    cq_loader_close(l);
    cq_corpus_close(c);
}

static bool same_batch(const cq_batch *a, const cq_batch *b) {
    size_t t = (size_t)a->tokens, d = (size_t)a->n_docs;
    return a->tokens == b->tokens && a->n_docs == b->n_docs && a->valid == b->valid &&
           memcmp(a->ids, b->ids, t * sizeof *a->ids) == 0 &&
           memcmp(a->labels, b->labels, t * sizeof *a->labels) == 0 &&
           memcmp(a->positions, b->positions, t * sizeof *a->positions) == 0 &&
           memcmp(a->starts, b->starts, (d + 1) * sizeof *a->starts) == 0 &&
           memcmp(a->doc, b->doc, d * sizeof *a->doc) == 0;
}

Test(loader, seek_continues_with_the_same_bits) {
    cq_corpus *c = make_corpus(DOCS, LONGEST, 6);
    cq_loader_options o = {.seq = 50, .batch = 4, .micro = 2, .shuffle = true, .seed = 10};
    for (int steps = 0; steps < 30; steps++) {
        cq_loader *a = NULL, *b = NULL;
        const cq_batch *x, *y;
        int64_t n, m;
        OK(cq_loader_open(&a, c, &o));
        OK(cq_loader_open(&b, c, &o));
        for (int i = 0; i < steps; i++)
            OK(cq_loader_next(a, &x, &n));
        OK(cq_loader_next(b, &y, &m)); // a loader that was elsewhere before
        OK(cq_loader_seek(b, cq_loader_position(a)));
        for (int i = 0; i < 3; i++) {
            OK(cq_loader_next(a, &x, &n));
            OK(cq_loader_next(b, &y, &m));
            cr_assert_eq(n, m);
            for (int64_t k = 0; k < n; k++)
                cr_expect(same_batch(&x[k], &y[k]), "after %d steps, step %d, micro-batch %lld",
                          steps, i, (long long)k);
        }
        cq_loader_close(a);
        cq_loader_close(b);
    }
    cq_corpus_close(c);
}

Test(loader, wrong_options_are_refused) {
    cq_corpus *c = make_corpus(5, LONGEST, 7);
    cq_loader *l = NULL;
    cq_loader_options o = {.seq = 64, .batch = 3, .micro = 2};
    cr_expect_eq(cq_loader_open(&l, c, &o), CQ_EUSAGE);
    o = (cq_loader_options){.seq = 0, .batch = 1, .micro = 1};
    cr_expect_eq(cq_loader_open(&l, c, &o), CQ_EUSAGE);
    o = (cq_loader_options){.seq = 1, .batch = 1, .micro = 1};
    cr_expect_eq(cq_loader_open(&l, c, &o), CQ_EDATA, "a document longer than seq");
    cr_expect(strstr(cq_error(), "seq"), "%s", cq_error());
    cr_expect_null(l);
    o = (cq_loader_options){.seq = 64, .batch = 1, .micro = 1};
    OK(cq_loader_open(&l, c, &o));
    cr_expect_eq(cq_loader_seek(l, -1), CQ_EUSAGE);
    cq_loader_close(l);
    cq_corpus_close(c);
}

Test(batch, given_ids_get_positions_labels_and_counts) {
    static const int32_t ids[] = {4, 5, 6, 7, 8};
    static const int64_t starts[] = {0, 3, 4};
    static const int32_t wanted_labels[] = {5, 6, -100, -100, -100},
                         wanted_positions[] = {0, 1, 2, 0, 0};
    cq_batch *b = NULL;
    OK(cq_batch_make(&b, ids, NULL, 5, starts, 3));
    cr_expect(b->tokens == 5 && b->n_docs == 3 && b->starts[3] == 5 && b->valid == 2);
    cr_expect(memcmp(b->labels, wanted_labels, sizeof wanted_labels) == 0);
    cr_expect(memcmp(b->positions, wanted_positions, sizeof wanted_positions) == 0);
    cq_batch_free(b);
    OK(cq_batch_make(&b, ids, (int32_t[]){-100, 6, -100, -100, -100}, 5, starts, 3));
    cr_expect(b->valid == 1 && b->labels[1] == 6);
    cq_batch_free(b);
    cr_expect_eq(cq_batch_make(&b, ids, NULL, 5, (int64_t[]){0, 3, 3}, 3), CQ_EUSAGE);
    cr_expect_eq(cq_batch_make(&b, ids, NULL, 5, (int64_t[]){1, 3}, 2), CQ_EUSAGE);
    cr_expect_eq(cq_batch_make(&b, ids, NULL, 5, (int64_t[]){0, 5}, 2), CQ_EUSAGE);
}

Test(show, colours_targets_and_spells_out_control_characters) {
    cq_tokenizer *t = open_model("nemotron_h_gsm8k");
    cq_corpus_options o = options(CQ_TEMPLATE_NONE, CQ_MASK_ASSISTANT);
    cq_corpus *c = open_text(
        "{\"prompt\": \"a\\u001b[2J\\n\", \"completion\": \"b\\u0000\\u009bc\\t\"}", t, &o);
    expect_show(c, t, 0, "a\\x1b[2J\n[[b\\x00\\x9bc\t]]");
    char *text;
    OK(cq_corpus_show(c, t, 0, true, &text));
    cr_expect_str_eq(text, "a\\x1b[2J\n\033[32mb\\x00\\x9bc\t\033[0m");
    free(text);
    cr_expect_eq(cq_corpus_show(c, t, 1, true, &text), CQ_EUSAGE);
    cq_corpus_close(c);
    cq_tokenizer_close(t);
}
