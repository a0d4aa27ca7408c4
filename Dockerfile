# The organisers' base by default; any image with Python 3.11 or newer, pip and venv will do.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS packages

# Where torch comes from: the default wheels are built for CUDA 13 and need an NVIDIA driver of 580
# or newer. For an older driver: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126
ARG TORCH_INDEX=

# For `python -m cluster`, with Ray: --build-arg REQUIREMENTS=requirements-cluster.txt
ARG REQUIREMENTS=requirements.txt

COPY requirements.txt requirements-cluster.txt ./
RUN python3 -m venv /opt/abdoseg && \
    if [ -n "${TORCH_INDEX}" ]; then \
        torch=$(grep '^torch==' requirements.txt) && \
        /opt/abdoseg/bin/pip install --no-cache-dir --index-url "${TORCH_INDEX}" "${torch}"; \
    fi && \
    /opt/abdoseg/bin/pip install --no-cache-dir --compile -r "${REQUIREMENTS}"

# What torch's eager kernels never load is left out (--build-arg PACKAGES=all keeps it). Known by: the
# loader's list (readelf -d: nothing that stays has these as NEEDED), the names of libraries in the
# strings of those that stay (what they could dlopen), LD_DEBUG=libs of a run, and the functions of
# cuDNN that torch asks for, by the sub-library that has them. tests/container holds what stays to it.
ARG PACKAGES=lean
RUN [ "${PACKAGES}" = all ] || { cd /opt/abdoseg/lib/python3*/site-packages && rm -rf \
    # torch.compile's compiler; torch looks for it, and does without
    triton triton-*.dist-info \
    # Python's binding of the driver, for profiling CUDA graphs; torch imports it if it is there
    cuda cuda_bindings-*.dist-info cuda_pathfinder-*.dist-info \
    # torch.linalg on CUDA, which torch loads at its first use, and its solvers, which only it needs
    torch/lib/libtorch_cuda_linalg.so nvidia/*/lib/libcusolver.so.* nvidia/*/lib/libcusolverMg.so.* \
    # a second runtime compiler, named by nothing
    nvidia/*/lib/libnvrtc.alt.so.* nvidia/*/lib/libnvrtc-builtins.alt.so.* \
    # cuDNN: recurrent networks, attention, CTC loss (adv), causal convolutions in 1D (ext). Its shim
    # loads a sub-library at the first call of one of its functions; of ext's torch calls none, of
    # adv's those of nn.RNN and ctc_loss
    nvidia/cudnn/lib/libcudnn_adv.so.* nvidia/cudnn/lib/libcudnn_ext.so.* \
    # what CUPTI, which torch links, loads to count instructions or sample a kernel
    nvidia/*/lib/libnvperf_*.so nvidia/*/lib/libcheckpoint.so nvidia/*/lib/libpcsamplingutil.so \
    # BLAS and FFTW by their old names, markers for a debugger: named by nothing
    nvidia/*/lib/libnvblas.so.* nvidia/*/lib/libcufftw.so.* nvidia/*/lib/libnvtx3interop.so.* \
    # several machines: these need MPI, PMIx, libfabric, UCX or InfiniBand, which the base has not
    nvidia/nvshmem/lib/nvshmem_bootstrap_* nvidia/nvshmem/lib/nvshmem_transport_* \
    nvidia/*/lib/libcufile_rdma.so.* \
    # for compiling against
    nvidia/*/include torch/include torch/share torch/bin/protoc* \
    nvidia/*/lib/*.a nvidia/*/lib/*.bc; }

FROM ${BASE}

LABEL org.opencontainers.image.title="abdoseg" \
      org.opencontainers.image.description="Abdominal CT multi-organ segmentation" \
      org.opencontainers.image.licenses="MIT AND LicenseRef-research-only-weights" \
      abdoseg.licence.code="MIT: LICENSE" \
      abdoseg.licence.weights="each file its own, stated in weights/*.md; abdomen-slim: research only"

ENV PATH=/opt/abdoseg/bin:${PATH} PYTHONUNBUFFERED=1

COPY --from=packages /opt/abdoseg /opt/abdoseg

WORKDIR /workspace

COPY LICENSE requirements.txt predict.sh ./
COPY inference inference
COPY cluster cluster
COPY weights weights
# Whatever user the container runs as may read it, whatever the checkout's own permissions were. Only
# what lacks them is changed: a changed file is in the image twice.
RUN python3 -m compileall -q inference cluster && \
    find . \( ! -perm -444 -o -type d ! -perm -111 \) -exec chmod a+rX {} +

CMD ["sh", "predict.sh"]
