/// test_plan.c - shapes, views, and the plan that places every buffer before the first one exists.
#include "core/base/error.h"
#include "core/tensor/plan.h"
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

#define LINE 64

static cq_plan *open_plan(void) {
    cq_plan *p;
    cr_assert_eq(cq_plan_open(&p), CQ_OK);
    return p;
}

static void add(cq_plan *p, cq_tensor *t, cq_purpose purpose, int64_t bytes) {
    cr_assert_eq(cq_plan_add(p, t, purpose, "buffer", CQ_U8, CQ_SHAPE1(bytes)), CQ_OK);
}

/* ---- shapes ---- */

Test(shape, elements_bytes_and_text) {
    char text[96];
    cq_shape s = CQ_SHAPE4(2, 3, 4, 5), scalar = {.rank = 0};
    int64_t bytes;
    cr_assert_eq(cq_shape_elems(s), 120);
    cr_assert_eq(cq_shape_elems(scalar), 1);
    cr_assert_eq(cq_tensor_bytes((cq_tensor){.shape = s, .dtype = CQ_BF16}), 240);
    cr_assert_str_eq(cq_shape_text(text, sizeof text, s), "[2, 3, 4, 5]");
    cr_assert_str_eq(cq_shape_text(text, sizeof text, scalar), "[]");
    cr_assert_str_eq(cq_shape_text(text, 6, s), "[2, 3");
    cr_assert_eq(cq_shape_bytes(&bytes, scalar, CQ_F64), CQ_OK);
    cr_assert_eq(bytes, 8);
    cr_assert_eq(cq_shape_bytes(&bytes, CQ_SHAPE2(5, 0), CQ_F64), CQ_OK);
    cr_assert_eq(bytes, 0);
}

Test(shape, equality_looks_at_rank_and_used_dimensions) {
    cq_shape a = CQ_SHAPE2(2, 3), b = CQ_SHAPE3(2, 3, 1), c = a;
    c.dim[3] = 77;
    cr_assert(cq_shape_equal(a, c));
    cr_assert_not(cq_shape_equal(a, b));
    cr_assert_not(cq_shape_equal(a, CQ_SHAPE2(3, 2)));
}

Test(shape, what_does_not_fit_63_bits_is_refused) {
    int64_t bytes, big = (int64_t)1 << 32;
    cr_assert_eq(cq_shape_bytes(&bytes, CQ_SHAPE2(big, big), CQ_U8), CQ_ESHAPE);
    cr_assert_eq(cq_shape_bytes(&bytes, CQ_SHAPE2(big, big / 4), CQ_F32), CQ_ESHAPE);
    cr_assert_eq(cq_shape_bytes(&bytes, CQ_SHAPE2(big, big / 4), CQ_U8), CQ_OK);
    cr_assert_eq(bytes, (int64_t)1 << 62);
    cr_assert_eq(cq_shape_bytes(&bytes, CQ_SHAPE3(big, big, 0), CQ_U8), CQ_ESHAPE);
    cr_assert_eq(cq_shape_bytes(&bytes, CQ_SHAPE1(-1), CQ_U8), CQ_ESHAPE);
    cr_assert_eq(cq_shape_bytes(&bytes, (cq_shape){.rank = 5}, CQ_U8), CQ_ESHAPE);
}

Test(shape, rows_are_a_view_of_the_outermost_dimension) {
    float data[24];
    cq_tensor t = {data, CQ_SHAPE3(4, 2, 3), CQ_F32}, r = cq_tensor_rows(t, 1, 2);
    cr_assert_eq((float *)r.data, data + 6);
    cr_assert(cq_shape_equal(r.shape, CQ_SHAPE3(2, 2, 3)));
    cr_assert_eq(cq_tensor_rows(t, 4, 0).shape.dim[0], 0);
}

/* ---- the plan ---- */

Test(plan, commit_binds_zeroed_aligned_buffers_that_do_not_touch) {
    cq_plan *p = open_plan();
    cq_tensor t[40];
    for (int i = 0; i < 40; i++)
        cr_assert_eq(
            cq_plan_add(p, &t[i], (cq_purpose)(i % CQ_N_PURPOSES), "t", CQ_BF16, CQ_SHAPE2(i, 7)),
            CQ_OK);
    cr_assert_null(t[3].data, "bound before commit");
    cr_assert_eq(t[3].dtype, CQ_BF16);
    cr_assert(cq_shape_equal(t[3].shape, CQ_SHAPE2(3, 7)));
    cr_assert_eq(cq_plan_commit(p, 0), CQ_OK, "%s", cq_error());
    cr_assert(cq_plan_committed(p));
    for (int i = 0; i < 40; i++) {
        const unsigned char *at = t[i].data;
        cr_assert(at && (uintptr_t)at % LINE == 0);
        for (int64_t k = 0; k < cq_tensor_bytes(t[i]); k++)
            cr_assert_eq(at[k], 0, "buffer %d is not zero, or shared", i);
        memset(t[i].data, 0xff, (size_t)cq_tensor_bytes(t[i]));
    }
    cq_plan_close(p);
}

Test(plan, planned_bytes_add_up) {
    cq_plan *p = open_plan();
    cq_tensor a, b, c;
    add(p, &a, CQ_FOR_CKA, 100);
    add(p, &b, CQ_FOR_CKA, 1);
    add(p, &c, CQ_FOR_LOGITS, 1000);
    cr_assert_eq(cq_plan_bytes(p, CQ_FOR_CKA), 2 * LINE + 1);
    cr_assert_eq(cq_plan_bytes(p, CQ_FOR_LOGITS), 1000);
    cr_assert_eq(cq_plan_bytes(p, CQ_FOR_TEACHER), 0);
    cr_assert_eq(cq_plan_bytes(p, CQ_N_PURPOSES), 2 * LINE + 1 + 1000);
    cq_plan_close(p);
}

Test(plan, rewind_shares_bytes_and_the_longest_branch_decides) {
    cq_plan *p = open_plan();
    cq_tensor kept, first, second, third, other;
    add(p, &kept, CQ_FOR_SCRATCH, 10);
    int64_t mark = cq_plan_mark(p, CQ_FOR_SCRATCH);
    add(p, &first, CQ_FOR_SCRATCH, 300);
    cq_plan_rewind(p, CQ_FOR_SCRATCH, mark);
    add(p, &second, CQ_FOR_SCRATCH, 500);
    add(p, &other, CQ_FOR_CKA, 500);
    cq_plan_rewind(p, CQ_FOR_SCRATCH, mark);
    add(p, &third, CQ_FOR_SCRATCH, 20);
    cr_assert_eq(cq_plan_bytes(p, CQ_FOR_SCRATCH), LINE + 500);
    cr_assert_eq(cq_plan_commit(p, 1 << 20), CQ_OK);
    cr_assert_eq(first.data, second.data);
    cr_assert_eq(first.data, third.data);
    cr_assert_eq((char *)first.data, (char *)kept.data + LINE);
    memset(second.data, 1, 500);
    cr_assert_eq(((char *)kept.data)[9], 0);
    cr_assert_eq(((char *)other.data)[0], 0);
    cq_plan_close(p);
}

Test(plan, empty_buffers_have_an_address) {
    cq_plan *p = open_plan();
    cq_tensor a, b, c;
    add(p, &a, CQ_FOR_CKA, 0);
    add(p, &b, CQ_FOR_LOGITS, 5);
    add(p, &c, CQ_FOR_LOGITS, 0);
    cr_assert_eq(cq_plan_commit(p, 0), CQ_OK);
    cr_assert(a.data && b.data && c.data);
    cq_plan_close(p);
}

Test(plan, what_does_not_fit_is_refused_with_its_largest_parts) {
    cq_plan *p = open_plan();
    cq_tensor a, b, c, d;
    add(p, &a, CQ_FOR_STUDENT, 3 << 20);
    add(p, &b, CQ_FOR_TEACHER, 5 << 20);
    add(p, &c, CQ_FOR_MOMENTS, 4 << 20);
    add(p, &d, CQ_FOR_CKA, 1 << 20);
    cr_assert_eq(cq_plan_commit(p, 13 << 20), CQ_OK);
    cq_plan_close(p);
    p = open_plan();
    add(p, &a, CQ_FOR_STUDENT, 3 << 20);
    add(p, &b, CQ_FOR_TEACHER, 5 << 20);
    add(p, &c, CQ_FOR_MOMENTS, 4 << 20);
    add(p, &d, CQ_FOR_CKA, 1 << 20);
    cr_assert_eq(cq_plan_commit(p, (13 << 20) - 1), CQ_ENOMEM);
    cr_assert(strstr(cq_error(), "13.0 MiB planned"), "%s", cq_error());
    cr_assert(strstr(cq_error(), "teacher weights 5.0, AdamW moments 4.0, student weights 3.0"),
              "%s", cq_error());
    cr_assert_null(strstr(cq_error(), "CKA"));
    cr_assert_null(a.data);
    cr_assert_not(cq_plan_committed(p));
    cr_assert_eq(cq_plan_commit(p, 14 << 20), CQ_OK, "a refusal is not the end");
    cq_plan_close(p);
}

Test(plan, more_than_the_machine_has_is_refused_before_mapping) {
    cq_plan *p = open_plan();
    cq_tensor t;
    add(p, &t, CQ_FOR_ACTIVATIONS, (int64_t)1 << 50);
    cr_assert_eq(cq_plan_commit(p, 0), CQ_ENOMEM);
    cr_assert(strstr(cq_error(), "available memory"), "%s", cq_error());
    cr_assert_eq(cq_plan_commit(p, INT64_MAX), CQ_ENOMEM, "the system refuses the mapping");
    cr_assert(strstr(cq_error(), "activations") && strstr(cq_error(), "Cannot allocate"), "%s",
              cq_error());
    cr_assert_null(t.data);
    cq_plan_close(p);
}

Test(plan, overflow_names_the_buffer) {
    cq_plan *p = open_plan();
    cq_tensor t;
    int64_t big = (int64_t)1 << 62;
    cr_assert_eq(cq_plan_add(p, &t, CQ_FOR_CKA, "gram", CQ_F32, CQ_SHAPE1(big)), CQ_ESHAPE);
    cr_assert(strstr(cq_error(), "gram"), "%s", cq_error());
    cr_assert_eq(cq_plan_add(p, &t, CQ_FOR_CKA, "gram", CQ_U8, CQ_SHAPE1(-1)), CQ_ESHAPE);
    add(p, &t, CQ_FOR_CKA, big);
    cr_assert_eq(cq_plan_add(p, &t, CQ_FOR_CKA, "second", CQ_U8, CQ_SHAPE1(big)), CQ_ESHAPE);
    cr_assert(strstr(cq_error(), "second"), "%s", cq_error());
    add(p, &t, CQ_FOR_LOGITS, big);
    add(p, &t, CQ_FOR_MOMENTS, big);
    cr_assert_eq(cq_plan_bytes(p, CQ_N_PURPOSES), INT64_MAX);
    cr_assert_eq(cq_plan_commit(p, 1), CQ_ENOMEM);
    cq_plan_close(p);
}

Test(plan, nothing_is_declared_or_committed_after_commit) {
    cq_plan *p = open_plan();
    cq_tensor t;
    cr_assert_eq(cq_plan_commit(p, 0), CQ_OK, "an empty plan");
    cr_assert_eq(cq_plan_commit(p, 0), CQ_EUSAGE);
    cr_assert_eq(cq_plan_add(p, &t, CQ_FOR_CKA, "late", CQ_F32, CQ_SHAPE1(1)), CQ_EUSAGE);
    cr_assert(strstr(cq_error(), "late"), "%s", cq_error());
    cq_plan_close(p);
    cq_plan_close(NULL);
}

Test(plan, one_for_a_device_that_is_not_here_counts_and_is_never_mapped) {
    cq_plan *p = open_plan();
    cq_tensor t;
    cr_assert_not(cq_plan_on_device(p));
    cq_plan_imagine(p);
    cr_assert(cq_plan_on_device(p));
    add(p, &t, CQ_FOR_TEACHER, (int64_t)1 << 50);
    cr_assert_eq(cq_plan_bytes(p, CQ_FOR_TEACHER), (int64_t)1 << 50);
    cr_assert_eq(cq_plan_commit(p, (int64_t)1 << 51), CQ_EUSAGE);
    cr_assert(strstr(cq_error(), "only counts"), "%s", cq_error());
    cr_assert_not(cq_plan_committed(p));
    cq_plan_close(p);
}

Test(plan, unknown_purposes_and_dtypes_are_usage_errors) {
    cq_plan *p = open_plan();
    cq_tensor t;
    cr_assert_eq(cq_plan_add(p, &t, CQ_N_PURPOSES, "x", CQ_F32, CQ_SHAPE1(1)), CQ_EUSAGE);
    cr_assert_eq(cq_plan_add(p, &t, CQ_FOR_CKA, "x", (cq_dtype)99, CQ_SHAPE1(1)), CQ_EUSAGE);
    for (int i = 0; i < CQ_N_PURPOSES; i++)
        cr_assert(strlen(cq_purpose_name((cq_purpose)i)) > 1);
    cq_plan_close(p);
}

Test(memory, the_peak_grows_by_what_is_touched) {
    cq_plan *p = open_plan();
    cq_tensor t;
    int64_t before = cq_memory_peak(), bytes = 64 << 20;
    cr_assert(before > 0 && before < (int64_t)1 << 40);
    add(p, &t, CQ_FOR_SCRATCH, bytes);
    cr_assert_eq(cq_plan_commit(p, 0), CQ_OK);
    memset(t.data, 1, (size_t)bytes);
    int64_t grown = cq_memory_peak() - before;
    cr_assert(grown > bytes - (16 << 20) && grown < bytes + (32 << 20), "grew by %ld", (long)grown);
    cq_plan_close(p);
}

Test(memory, available_is_at_most_what_the_machine_has) {
    long long kib = 0;
    FILE *f = fopen("/proc/meminfo", "r");
    cr_assert(f && fscanf(f, "MemTotal: %lld", &kib) == 1);
    fclose(f);
    int64_t available = cq_memory_available();
    cr_assert(available > 0 && available <= kib * 1024, "%ld", (long)available);
}
