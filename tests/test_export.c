/* test_export.c - an exported folder: the bits that were trained, a layout servers read, and a
 * verify that finds each kind of damage and names the tensor. */
#include "core/model/json.h"
#include "kernels/nvfp4.h"
#include "tests/harness.h"
#include <unistd.h>

typedef struct folder {
    harness h;
    char root[64], dir[96], source[512];
} folder;

static void open_export(folder *f, const char *model, cq_quant_options quant) {
    harness_options o = {
        .dir = model, .dtype = CQ_F32, .kernels = "ref", .mode = CQ_MODE_SAVE, .quant = quant};
    harness_open(&f->h, &o);
    harness_disturb(&f->h, 0.03); /* trained weights differ from those that were calibrated */
    snprintf(f->root, sizeof f->root, "/tmp/ckaqad-export-XXXXXX");
    cr_assert_not_null(mkdtemp(f->root));
    snprintf(f->dir, sizeof f->dir, "%s/nvfp4", f->root);
    snprintf(f->source, sizeof f->source, "%s/golden/%s", CQ_TESTS, model);
    OK(cq_export_nvfp4(f->h.student, f->dir, 0));
}

static void close_export(folder *f) {
    OK(cq_folder_remove(f->root));
    harness_close(&f->h);
}

static char *read_text(const char *dir, const char *name) {
    char path[1024], *text;
    int64_t bytes;
    OK(cq_path_join(path, sizeof path, dir, name));
    OK(cq_file_read(&text, &bytes, path));
    return text;
}

static void write_text(const char *dir, const char *name, const char *text) {
    char path[1024];
    OK(cq_path_join(path, sizeof path, dir, name));
    OK(cq_file_write(path, text, (int64_t)strlen(text)));
}

/* Writes the folder's tensors again as one file: without `name`, then with `t` under `as`. */
static void rewrite(const char *dir, const char *name, const char *as, cq_tensor t) {
    cq_safetensors *st;
    cq_st_writer *w;
    OK(cq_safetensors_open(&st, dir));
    OK(cq_st_writer_open(&w));
    for (int64_t i = 0; i < cq_safetensors_count(st); i++) {
        const cq_entry *e = cq_safetensors_at(st, i);
        if (!name || strcmp(e->name, name))
            OK(cq_st_writer_add(w, e->name, e->tensor));
    }
    if (as)
        OK(cq_st_writer_add(w, as, t));
    OK(cq_st_writer_folder(w, dir, 0));
    cq_st_writer_close(w);
    cq_safetensors_close(st);
}

/* A copy of one tensor of the folder. */
static cq_tensor take(const char *dir, const char *name) {
    cq_safetensors *st;
    OK(cq_safetensors_open(&st, dir));
    const cq_entry *e = cq_safetensors_find(st, name);
    cr_assert_not_null(e, "%s", name);
    cq_tensor t = e->tensor;
    t.data = malloc((size_t)cq_tensor_bytes(t));
    memcpy(t.data, e->tensor.data, (size_t)cq_tensor_bytes(t));
    cq_safetensors_close(st);
    return t;
}

static const cq_quant_options options[] = {
    {.preset = "all"},
    {.preset = "nemotron_nano"},
    {.preset = "all", .weights_only = true},
    {.preset = "mlp", .scales = CQ_SCALE_MSE},
    {.preset = "all", .scales = CQ_SCALE_FOUR_OVER_SIX},
};
static const char *const models[] = {"nemotron_h_tiny", "qwen3_tiny"};

static void expect_clean(const folder *f, const char *what) {
    cq_verify *v;
    bool failed;
    OK(cq_verify_open(&v, f->dir, f->source));
    for (int64_t i = 0; i < cq_verify_count(v); i++) {
        const char *line = cq_verify_line(v, i, &failed);
        cr_expect(!failed, "%s: %s", what, line);
    }
    cr_expect_eq(cq_verify_failed(v), 0);
    cr_expect_geq(cq_verify_count(v), 6, "statistics are missing");
    cq_verify_close(v);
}

Test(export, dequantizes_to_the_trained_bits_and_passes_verify) {
    for (size_t i = 0; i < sizeof options / sizeof *options; i++)
        for (int k = 0; k < 2; k++) {
            folder f;
            int64_t differing = -1;
            char what[96];
            snprintf(what, sizeof what, "%s, options %zu", models[k], i);
            open_export(&f, models[k], options[i]);
            OK(cq_export_compare(f.h.student, f.dir, &differing));
            cr_expect_eq(differing, 0, "%s: %ld elements differ", what, (long)differing);
            expect_clean(&f, what);
            close_export(&f);
        }
}

Test(export, searched_scales_come_back_after_a_look_without_them) {
    for (int k = 0; k < 2; k++)
        for (int i = 3; i < 5; i++) {
            folder searched, plain;
            int64_t differing[3] = {-1, -1, -1};
            cq_quant_options o = {.preset = options[i].preset};
            open_export(&searched, models[k], options[i]);
            open_export(&plain, models[k], o);
            cq_model *m = searched.h.student;
            OK(cq_export_compare(m, plain.dir, &differing[0]));
            OK(cq_model_searched_scales(m, &searched.h.stream, false));
            OK(cq_model_searched_scales(m, &searched.h.stream, false));
            OK(cq_export_compare(m, plain.dir, &differing[1]));
            OK(cq_model_searched_scales(m, &searched.h.stream, true));
            OK(cq_export_compare(m, searched.dir, &differing[2]));
            cr_expect_gt(differing[0], 0);
            cr_expect_eq(differing[1], 0, "%ld elements differ", (long)differing[1]);
            cr_expect_eq(differing[2], 0, "%ld elements differ", (long)differing[2]);
            close_export(&plain);
            close_export(&searched);
        }
}

Test(export, of_a_double_model_packs_its_narrowed_weights) {
    harness h;
    harness_options o = {.dir = models[0],
                         .dtype = CQ_F64,
                         .kernels = "ref",
                         .mode = CQ_MODE_SAVE,
                         .quant = options[4]};
    char root[] = "/tmp/ckaqad-export-XXXXXX", dir[64];
    int64_t differing = -1;
    harness_open(&h, &o);
    cr_assert_not_null(mkdtemp(root));
    OK(cq_path_join(dir, sizeof dir, root, "nvfp4"));
    OK(cq_export_nvfp4(h.student, dir, 0));
    OK(cq_export_compare(h.student, dir, &differing));
    cr_expect_eq(differing, 0, "%ld elements differ", (long)differing);
    OK(cq_folder_remove(root));
    harness_close(&h);
}

Test(export, compare_counts_elements_that_differ) {
    folder f;
    int64_t differing;
    const char *name = "backbone.layers.0.mixer.in_proj.weight";
    open_export(&f, models[0], options[0]);
    cq_tensor t = take(f.dir, name);
    ((uint8_t *)t.data)[5] ^= 0x31; /* both codes of one byte */
    rewrite(f.dir, name, name, t);
    OK(cq_export_compare(f.h.student, f.dir, &differing));
    cr_expect_eq(differing, 2);
    free(t.data);
    close_export(&f);
}

Test(export, loads_back_as_the_model_that_was_trained) {
    for (int k = 0; k < 2; k++) {
        folder f;
        cq_model *m;
        cq_plan *p;
        open_export(&f, models[k], options[1]);
        OK(cq_model_open(&m, f.dir, CQ_F32));
        cr_expect(cq_model_is_nvfp4(m));
        OK(cq_plan_open(&p));
        OK(cq_model_plan_params(m, p, false));
        OK(cq_plan_commit(p, 0));
        OK(cq_model_load(m));
        for (int64_t i = 0; i < cq_model_n_params(m); i++) {
            cq_param *a = cq_model_param(m, i), *b = cq_model_find(f.h.student, a->name);
            int64_t n = cq_tensor_elems(a->value);
            float *wanted = malloc((size_t)n * sizeof *wanted);
            uint16_t *narrow = malloc((size_t)n * sizeof *narrow);
            memcpy(wanted, b->fq.data, (size_t)n * sizeof *wanted);
            if (!b->quantized && b->disk == CQ_BF16) { /* rounded to its checkpoint dtype */
                OK(cq_convert(narrow, CQ_BF16, wanted, CQ_F32, n));
                OK(cq_convert(wanted, CQ_F32, narrow, CQ_BF16, n));
            }
            cr_expect_eq(a->quantized, b->quantized, "%s", a->name);
            cr_expect_eq(memcmp(a->value.data, wanted, (size_t)n * sizeof *wanted), 0, "%s",
                         a->name);
            if (a->quantized)
                cr_expect_eq(*a->amax_x / 2688.0f, *b->amax_x / 2688.0f, "%s: input scale",
                             a->name);
            free(wanted);
            free(narrow);
        }
        cq_model_close(m);
        cq_plan_close(p);
        close_export(&f);
    }
}

static void expect_tensor(const cq_safetensors *st, const cq_param *p, const char *suffix,
                          cq_dtype dtype, cq_shape shape) {
    char name[192], text[64];
    snprintf(name, sizeof name, "%.*s%s", (int)(strlen(p->name) - strlen(".weight")), p->name,
             suffix);
    const cq_entry *e = cq_safetensors_find(st, name);
    cr_assert_not_null(e, "%s is missing", name);
    cr_expect(e->tensor.dtype == dtype && cq_shape_equal(e->tensor.shape, shape), "%s: %s %s", name,
              cq_dtype_name(e->tensor.dtype), cq_shape_text(text, sizeof text, e->tensor.shape));
}

static void check_layout(bool weights_only) {
    folder f;
    cq_safetensors *st;
    int64_t wanted = 0;
    open_export(&f, models[0], options[weights_only ? 2 : 0]);
    OK(cq_safetensors_open(&st, f.dir));
    cr_expect_str_eq(cq_safetensors_metadata(st, "format"), "pt");
    for (int64_t i = 0; i < cq_model_n_params(f.h.student); i++) {
        const cq_param *p = cq_model_param(f.h.student, i);
        const cq_entry *e = cq_safetensors_find(st, p->name);
        cr_assert_not_null(e, "%s", p->name);
        wanted++;
        if (!p->quantized) {
            cr_expect(e->tensor.dtype == p->disk && cq_shape_equal(e->tensor.shape, p->shape), "%s",
                      p->name);
            continue;
        }
        int64_t n = p->shape.dim[0], k = p->shape.dim[1];
        cq_shape scalar = {{0}, 0};
        expect_tensor(st, p, ".weight", CQ_U8, CQ_SHAPE2(n, k / 2));
        expect_tensor(st, p, ".weight_scale", CQ_F8_E4M3, CQ_SHAPE2(n, k / 16));
        expect_tensor(st, p, ".weight_scale_2", CQ_F32, scalar);
        if (!weights_only)
            expect_tensor(st, p, ".input_scale", CQ_F32, scalar);
        wanted += weights_only ? 2 : 3;
    }
    const cq_entry *bias =
        cq_safetensors_find(st, "backbone.layers.1.mixer.gate.e_score_correction_bias");
    cr_expect(bias && bias->tensor.dtype == CQ_F32);
    cr_expect_eq(cq_safetensors_count(st), wanted);
    cq_safetensors_close(st);
    close_export(&f);
}

Test(export, has_four_tensors_for_a_matrix_with_quantized_inputs) { check_layout(false); }
Test(export, has_three_tensors_for_a_matrix_when_only_weights_are) { check_layout(true); }

Test(export, describes_itself_to_servers) {
    static const char *const wanted[] = {
        "lm_head",
        "backbone.layers.0.mixer.conv1d",
        "backbone.layers.2.mixer.in_proj",
        "backbone.layers.2.mixer.conv1d",
        "backbone.layers.2.mixer.out_proj",
        "backbone.layers.3.mixer.q_proj",
        "backbone.layers.3.mixer.k_proj",
        "backbone.layers.3.mixer.v_proj",
        "backbone.layers.3.mixer.o_proj",
        "backbone.layers.5.mixer.conv1d",
        "backbone.layers.6.mixer.conv1d",
    };
    folder f;
    json_t *hf, *config;
    char path[256];
    open_export(&f, models[0], options[1]);
    OK(cq_path_join(path, sizeof path, f.dir, "hf_quant_config.json"));
    OK(cq_json_load(&hf, path));
    OK(cq_path_join(path, sizeof path, f.dir, "config.json"));
    OK(cq_json_load(&config, path));
    const json_t *q = json_object_get(hf, "quantization"),
                 *list = json_object_get(q, "exclude_modules");
    cr_expect_str_eq(json_string_value(json_object_get(q, "quant_algo")), "NVFP4");
    cr_expect(json_is_null(json_object_get(q, "kv_cache_quant_algo")));
    cr_expect_eq(json_integer_value(json_object_get(q, "group_size")), 16);
    cr_assert_eq(json_array_size(list), sizeof wanted / sizeof *wanted);
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
        cr_expect_str_eq(json_string_value(json_array_get(list, i)), wanted[i]);
    const json_t *c = json_object_get(config, "quantization_config");
    cr_expect(json_equal(list, json_object_get(c, "ignore")));
    cr_expect_str_eq(json_string_value(json_object_get(c, "quant_method")), "modelopt");
    json_decref(hf);
    json_decref(config);
    close_export(&f);
}

Test(export, keeps_the_text_of_config_and_the_bytes_of_other_files) {
    static const char *const files[] = {"tokenizer.json", "tokenizer_config.json",
                                        "generation_config.json", "chat_template.jinja"};
    folder f;
    open_export(&f, models[0], options[0]);
    char *before = read_text(f.source, "config.json"), *after = read_text(f.dir, "config.json");
    size_t n = (size_t)(strrchr(before, '}') - before);
    while (n && (before[n - 1] == '\n' || before[n - 1] == ' '))
        n--;
    cr_expect_eq(strncmp(before, after, n), 0, "text before quantization_config changed");
    cr_expect_eq(strncmp(after + n, ",\n  \"quantization_config\": {", 28), 0);
    free(before);
    free(after);
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        char a[1024], b[1024], x[65], y[65];
        OK(cq_path_join(a, sizeof a, f.source, files[i]));
        OK(cq_path_join(b, sizeof b, f.dir, files[i]));
        OK(cq_sha256_file(a, x));
        OK(cq_sha256_file(b, y));
        cr_expect_str_eq(x, y, "%s", files[i]);
    }
    close_export(&f);
}

Test(export, replaces_its_own_folder_and_no_other) {
    folder f;
    char other[128], kept[160];
    open_export(&f, models[0], options[0]);
    write_text(f.dir, "stale.txt", "x");
    OK(cq_export_nvfp4(f.h.student, f.dir, 1 << 16)); /* in shards */
    OK(cq_path_join(kept, sizeof kept, f.dir, "stale.txt"));
    cr_expect(!cq_file_exists(kept), "the earlier export is gone as a whole");
    OK(cq_path_join(kept, sizeof kept, f.dir, "model.safetensors.index.json"));
    cr_expect(cq_file_exists(kept));
    expect_clean(&f, "shards");
    OK(cq_path_join(other, sizeof other, f.root, "mine"));
    OK(cq_folder_make(other));
    OK(cq_export_weights(f.h.student, other, 0)); /* an empty folder is free */
    write_text(f.root, "notes.txt", "x");
    cr_expect_eq(cq_export_nvfp4(f.h.student, f.root, 0), CQ_EUSAGE);
    cr_expect(strstr(cq_error(), f.root), "message is: %s", cq_error());
    cr_expect_eq(cq_export_nvfp4(f.h.student, other, 0), CQ_EUSAGE);
    cr_expect_eq(cq_export_weights(f.h.student, f.dir, 0), CQ_EUSAGE);
    cr_expect_eq(cq_export_nvfp4(f.h.student, f.source, 0), CQ_EUSAGE);
    cr_expect(strstr(cq_error(), "own folder"), "message is: %s", cq_error());
    close_export(&f);
}

Test(export, of_an_uncalibrated_student_is_refused_and_leaves_nothing) {
    folder f;
    char path[128];
    open_export(&f, models[0], options[0]);
    cq_param *p = cq_model_find(f.h.student, "backbone.layers.0.mixer.in_proj.weight");
    *p->amax_x = 0;
    OK(cq_path_join(path, sizeof path, f.root, "second"));
    cr_expect_eq(cq_export_nvfp4(f.h.student, path, 0), CQ_ENUMERIC);
    cr_expect(strstr(cq_error(), p->name), "message is: %s", cq_error());
    *p->amax_x = 1;
    p->amax = 0;
    cr_expect_eq(cq_export_nvfp4(f.h.student, path, 0), CQ_ENUMERIC);
    p->amax = 1;
    ((float *)p->value.data)[3] = NAN;
    cr_expect_eq(cq_export_nvfp4(f.h.student, path, 0), CQ_ENUMERIC);
    cr_expect(!cq_file_exists(path));
    OK(cq_folder_remove(f.dir));
    cr_expect_eq(rmdir(f.root), 0, "a temporary folder was left");
    harness_close(&f.h);
}

Test(export, of_weights_is_a_checkpoint_that_opens_again) {
    folder f;
    cq_model *m;
    cq_plan *p;
    char path[128];
    open_export(&f, models[1], options[0]);
    OK(cq_path_join(path, sizeof path, f.root, "bf16"));
    OK(cq_export_weights(f.h.student, path, 0));
    OK(cq_export_weights(f.h.student, path, 0)); /* its own folder may be written again */
    OK(cq_model_open(&m, path, CQ_F32));
    cr_expect(!cq_model_is_nvfp4(m));
    OK(cq_plan_open(&p));
    OK(cq_model_plan_params(m, p, false));
    OK(cq_plan_commit(p, 0));
    OK(cq_model_load(m));
    for (int64_t i = 0; i < cq_model_n_params(m); i++) {
        cq_param *a = cq_model_param(m, i), *b = cq_model_find(f.h.student, a->name);
        for (int64_t k = 0; k < cq_tensor_elems(a->value); k++) {
            float x = ((float *)b->value.data)[k], y = ((float *)a->value.data)[k];
            cr_assert_leq(fabsf(x - y), fabsf(x) / 256, "%s[%ld]", a->name, (long)k);
        }
    }
    cq_model_close(m);
    cq_plan_close(p);
    close_export(&f);
}

/* verify: one kind of damage per case */

/* A failed finding of `rule` must name `name`. */
static void expect_finding(const folder *f, const char *against, int rule, const char *name) {
    cq_verify *v;
    char prefix[32];
    bool failed, found = false;
    snprintf(prefix, sizeof prefix, "rule %d: ", rule);
    OK(cq_verify_open(&v, f->dir, against));
    for (int64_t i = 0; i < cq_verify_count(v); i++) {
        const char *line = cq_verify_line(v, i, &failed);
        found = found || (failed && !strncmp(line, prefix, strlen(prefix)) && strstr(line, name));
    }
    cr_expect(found, "no finding of rule %d names %s", rule, name);
    if (!found)
        for (int64_t i = 0; i < cq_verify_count(v); i++)
            cr_log_warn("%s\n", cq_verify_line(v, i, &failed));
    cr_expect_gt(cq_verify_failed(v), 0);
    cq_verify_close(v);
}

/* Puts `bytes` at `at` of a tensor, or changes its dtype or shape, or drops it; expects the
 * finding; restores. */
typedef struct damage {
    const char *name;
    int rule;
    int64_t at, n;
    uint8_t bytes[4];
    bool drop, flat;
    cq_dtype dtype; ///< with `retype`
    bool retype;
    const char *finding; ///< NULL: name
} damage;

static void try_damage(const folder *f, const damage *d) {
    cq_tensor good = take(f->dir, d->name), bad = good;
    bad.data = malloc((size_t)cq_tensor_bytes(good) * 4 + 8);
    memset(bad.data, 0x3f, (size_t)cq_tensor_bytes(good) * 4 + 8);
    memcpy(bad.data, good.data, (size_t)cq_tensor_bytes(good));
    memcpy((uint8_t *)bad.data + d->at, d->bytes, (size_t)d->n);
    if (d->retype)
        bad.dtype = d->dtype;
    if (d->flat)
        bad.shape = CQ_SHAPE1(cq_tensor_elems(good));
    rewrite(f->dir, d->name, d->drop ? NULL : d->name, bad);
    expect_finding(f, NULL, d->rule, d->finding ? d->finding : d->name);
    rewrite(f->dir, d->drop ? NULL : d->name, d->name, good);
    free(bad.data);
    free(good.data);
}

#define L(i) "backbone.layers." #i ".mixer."

Test(verify, finds_damaged_tensors_by_name) {
    /* floats little endian: 0x7fc00000 NaN, 0x3f800000 1.0 */
    static const damage cases[] = {
        {.name = L(1) "experts.2.up_proj.weight", .rule = 1, .drop = true},
        {.name = L(0) "A_log", .rule = 1, .drop = true},
        {.name = L(0) "in_proj.weight", .rule = 1, .flat = true},
        {.name = L(0) "in_proj.weight_scale", .rule = 1, .flat = true},
        {.name = L(0) "in_proj.weight_scale", .rule = 1, .retype = true, .dtype = CQ_U8},
        {.name = L(0) "in_proj.weight_scale_2", .rule = 1, .flat = true},
        {.name = L(0) "D", .rule = 1, .retype = true, .dtype = CQ_I32},
        {.name = L(0) "D", .rule = 1, .n = 2, .bytes = {0xc0, 0x7f}},
        {.name = L(1) "experts.2.up_proj.weight_scale", .rule = 2, .drop = true},
        {.name = L(1) "experts.2.up_proj.weight_scale_2", .rule = 2, .drop = true},
        {.name = L(1) "experts.2.up_proj.input_scale", .rule = 2, .drop = true},
        {.name = L(1) "experts.2.up_proj.weight_scale_2", .rule = 2, .n = 4},
        {.name = L(1) "experts.2.up_proj.weight_scale_2",
         .rule = 2,
         .n = 4,
         .bytes = {0, 0, 0xc0, 0x7f}},
        {.name = L(1) "experts.2.down_proj.input_scale",
         .rule = 2,
         .n = 4,
         .bytes = {0, 0, 0x80, 0x7f}},
        {.name = L(1) "experts.2.down_proj.input_scale",
         .rule = 2,
         .n = 4,
         .bytes = {0, 0, 0x80, 0xbf}},
        {.name = L(3) "v_proj.weight_scale_2", .rule = 3, .n = 1, .bytes = {0}},
        {.name = L(3) "k_proj.input_scale", .rule = 3, .n = 1, .bytes = {0}},
        {.name = L(0) "out_proj.weight_scale", .rule = 4, .at = 7, .n = 1, .bytes = {0}},
        {.name = L(0) "out_proj.weight_scale", .rule = 4, .at = 7, .n = 1, .bytes = {0xb8}},
        {.name = L(0) "out_proj.weight_scale", .rule = 5, .at = 9, .n = 1, .bytes = {0x7f}},
        {.name = L(0) "out_proj.weight_scale", .rule = 5, .at = 9, .n = 1, .bytes = {0xff}},
        {.name = L(0) "out_proj.weight_scale",
         .rule = 5,
         .at = 9,
         .n = 1,
         .bytes = {0x7f},
         .finding = "[1, 3]"},
    };
    folder f;
    open_export(&f, models[0], options[0]);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        try_damage(&f, &cases[i]);
    expect_clean(&f, "after every repair");
    close_export(&f);
}

Test(verify, finds_a_tensor_scale_that_is_not_amax_over_2688) {
    folder f;
    const char *name = L(0) "out_proj.weight_scale_2", *blocks = L(0) "out_proj.weight_scale";
    float right, wrong;
    open_export(&f, models[0], options[0]);
    cq_tensor t = take(f.dir, name), s = take(f.dir, blocks);
    memcpy(&right, t.data, 4);
    wrong = 1 / right; /* as other formats store it */
    memcpy(t.data, &wrong, 4);
    rewrite(f.dir, name, name, t);
    expect_finding(&f, NULL, 6, L(0) "out_proj");
    memcpy(t.data, &right, 4);
    rewrite(f.dir, name, name, t);
    expect_clean(&f, "right again");
    for (int64_t i = 0; i < cq_tensor_bytes(s); i++) /* as if amax / 6 had been the tensor scale */
        ((uint8_t *)s.data)[i] = cq_e4m3_encode(cq_e4m3_decode(((uint8_t *)s.data)[i]) / 448);
    rewrite(f.dir, blocks, blocks, s);
    expect_finding(&f, NULL, 6, L(0) "out_proj");
    free(t.data);
    free(s.data);
    close_export(&f);
}

Test(verify, finds_extra_tensors_and_scales_of_modules_that_have_none) {
    static const struct {
        const char *name;
        int rule;
    } cases[] = {
        {"backbone.layers.99.norm.weight", 1},
        {L(1) "experts.99.up_proj.weight_scale", 1},
        {L(3) "k_proj.k_scale", 1},
        {"lm_head.weight_scale", 7},
        {L(2) "in_proj.weight_scale_2", 7},
        {L(0) "conv1d.weight_scale", 7},
        {L(1) "gate.input_scale", 7},
        {"backbone.embeddings.weight_scale", 7},
        {"backbone.layers.0.norm.input_scale", 7},
    };
    float one = 1;
    folder f;
    open_export(&f, models[0], options[1]);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        rewrite(f.dir, NULL, cases[i].name, (cq_tensor){&one, {{0}, 0}, CQ_F32});
        expect_finding(&f, NULL, cases[i].rule, cases[i].name);
        rewrite(f.dir, cases[i].name, NULL, (cq_tensor){0});
    }
    expect_clean(&f, "after every repair");
    close_export(&f);
}

Test(verify, finds_a_tied_head_that_is_stored_twice) {
    folder f;
    open_export(&f, models[1], options[0]);
    cq_tensor t = take(f.dir, "model.embed_tokens.weight");
    rewrite(f.dir, NULL, "lm_head.weight", t);
    expect_finding(&f, NULL, 8, "lm_head.weight");
    free(t.data);
    close_export(&f);
}

Test(verify, finds_gate_and_up_with_different_scales) {
    static const damage cases[] = {
        {.name = "model.layers.1.mlp.up_proj.weight_scale_2", .rule = 3, .n = 1, .bytes = {0}},
        {.name = "model.layers.1.mlp.up_proj.input_scale", .rule = 3, .n = 1, .bytes = {0}},
        {.name = "model.layers.2.self_attn.k_proj.weight_scale_2", .rule = 3, .n = 1, .bytes = {0}},
    };
    folder f;
    open_export(&f, models[1], options[0]);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        try_damage(&f, &cases[i]);
    close_export(&f);
}

/* Replaces one piece of a text file; expects a finding; restores. */
static void edit(const folder *f, const char *file, const char *from, const char *to, int rule,
                 const char *name) {
    char *text = read_text(f->dir, file), *at = strstr(text, from);
    cr_assert_not_null(at, "%s: %s", file, from);
    size_t size = strlen(text) + strlen(to) + 1;
    char *bad = malloc(size);
    snprintf(bad, size, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    write_text(f->dir, file, bad);
    expect_finding(f, f->source, rule, name);
    write_text(f->dir, file, text);
    free(text);
    free(bad);
}

Test(verify, finds_descriptions_that_disagree) {
    folder f;
    char path[256];
    open_export(&f, models[0], options[1]);
    const char *hf = "hf_quant_config.json", *config = "config.json";
    edit(&f, hf, "\"NVFP4\"", "\"FP8\"", 9, "quant_algo");
    edit(&f, hf, "\"group_size\": 16", "\"group_size\": 32", 9, "group_size");
    edit(&f, hf, "\"kv_cache_quant_algo\": null", "\"kv_cache_quant_algo\": \"FP8\"", 9,
         "kv_cache");
    edit(&f, hf, "backbone.layers.3.mixer.k_proj", "backbone.layers.3.mixer.x_proj", 9,
         "backbone.layers.3.mixer.k_proj");
    edit(&f, hf, "backbone.layers.3.mixer.k_proj", "backbone.layers.3.mixer.x_proj", 7,
         "backbone.layers.3.mixer.k_proj.weight");
    edit(&f, hf, "\"lm_head\"", "\"backbone.layers.0.mixer.in_proj\"", 7,
         "backbone.layers.0.mixer.in_proj.weight_scale");
    edit(&f, hf, "\"lm_head\"", "\"backbone.layers.0.mixer.in_proj\"", 7, "lm_head.weight");
    edit(&f, hf, "\"quantization\"", "\"quantisation\"", 9, hf);
    edit(&f, config, "\"quantization_config\"", "\"quantisation_config\"", 9, config);
    edit(&f, config, "\"num_bits\": 4", "\"num_bits\": 8", 9, "num_bits");
    edit(&f, config, "\"quant_method\": \"modelopt\"", "\"quant_method\": \"x\"", 9,
         "quant_method");
    OK(cq_path_join(path, sizeof path, f.dir, hf));
    cr_assert_eq(unlink(path), 0);
    expect_finding(&f, NULL, 9, hf);
    close_export(&f);
}

Test(verify, finds_changed_tokenizers_and_a_wrong_total_size) {
    folder f;
    char path[256], digits[32] = "";
    open_export(&f, models[0], options[0]);
    edit(&f, "tokenizer.json", "{", "{ ", 10, "tokenizer.json");
    edit(&f, "chat_template.jinja", "{", " {", 10, "chat_template.jinja");
    OK(cq_path_join(path, sizeof path, f.dir, "tokenizer_config.json"));
    cr_assert_eq(unlink(path), 0);
    expect_finding(&f, f.source, 10, "tokenizer_config.json");
    OK(cq_export_nvfp4(f.h.student, f.dir, 1 << 16));
    char *index = read_text(f.dir, "model.safetensors.index.json");
    const char *at = strstr(index, "\"total_size\": ");
    cr_assert_not_null(at);
    snprintf(digits, sizeof digits, "%.*s", (int)strspn(at + 14, "0123456789"), at + 14);
    free(index);
    cr_assert_gt(strlen(digits), 0);
    edit(&f, "model.safetensors.index.json", digits, "12345", 11, digits);
    write_text(f.dir, "model-00099-of-00099.safetensors", "x");
    expect_finding(&f, NULL, 11, "model-00099-of-00099.safetensors");
    close_export(&f);
}

Test(verify, a_folder_that_is_no_export_is_an_error) {
    cq_verify *v;
    char path[512];
    OK(cq_path_join(path, sizeof path, CQ_TESTS, "golden/nemotron_h_tiny"));
    cr_expect_eq(cq_verify_open(&v, path, NULL), CQ_EDATA);
    cr_expect(strstr(cq_error(), "hf_quant_config.json"), "message is: %s", cq_error());
    cr_expect_null(v);
    cr_expect_eq(cq_verify_open(&v, "/nonexistent", NULL), CQ_EIO);
    cr_expect_null(v);
    cq_verify_close(NULL);
}

Test(json, an_edit_keeps_every_other_character) {
    static const char *const cases[][3] = {
        /* source, with q = 1, without q */
        {"{}", "{\n  \"q\": 1\n}", "{}"},
        {"{\n  \"a\": 1e-05\n}\n", "{\n  \"a\": 1e-05,\n  \"q\": 1\n}\n", "{\n  \"a\": 1e-05\n}\n"},
        {"{\"q\": {\"q\": \"}\"}, \"a\": [\"q\", 2]}", "{\"a\": [\"q\", 2],\n  \"q\": 1\n}",
         "{\"a\": [\"q\", 2]}"},
        {"{\"a\": {\"q\": 2},\n \"q\": [1,\n 2]\n}", "{\"a\": {\"q\": 2},\n  \"q\": 1\n}",
         "{\"a\": {\"q\": 2}\n}"},
        {"{\"q\": 3}", "{\n  \"q\": 1\n}", "{}"},
        {"{\"a\": \"\\\"q\\\": 3\", \"t\": [0, Infinity]}",
         "{\"a\": \"\\\"q\\\": 3\", \"t\": [0, Infinity],\n  \"q\": 1\n}",
         "{\"a\": \"\\\"q\\\": 3\", \"t\": [0, Infinity]}"},
    };
    char dir[] = "/tmp/ckaqad-json-XXXXXX", path[64], *text;
    json_t *one = json_integer(1);
    cr_assert_not_null(mkdtemp(dir));
    OK(cq_path_join(path, sizeof path, dir, "x.json"));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_text(dir, "x.json", cases[i][0]);
        OK(cq_json_edit(&text, path, "q", one));
        cr_expect_str_eq(text, cases[i][1]);
        free(text);
        OK(cq_json_edit(&text, path, "q", NULL));
        cr_expect_str_eq(text, cases[i][2]);
        free(text);
    }
    json_decref(one);
    OK(cq_folder_remove(dir));
}
