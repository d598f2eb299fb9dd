# CPU:   docker build -t distill-llm .
# CUDA:  docker build -t distill-llm:cuda --build-arg CUDA=1 .
# Run:   docker run --rm distill-llm                                                  the quickstart
#        docker run --rm -v "$PWD:/work" distill-llm run recipes/my-data.yaml         anything else; runs/ stays in $PWD
#        (CUDA: add --gpus all; another user's folder: add --user "$(id -u):$(id -g)")
#        Downloads lie in the volume /work/.cache: add -v distill-cache:/work/.cache to keep them.
FROM python:3.11-slim

ARG CUDA=0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PIP_CONSTRAINT=/src/constraints.txt \
    PIP_BUILD_CONSTRAINT=/src/constraints.txt

WORKDIR /src

# The versions are those of constraints.txt, through PIP_CONSTRAINT.
# A layer of its own: torch is large, and changes only with constraints.txt.
COPY constraints.txt ./
# hadolint ignore=DL3013
RUN if [ "$CUDA" = 1 ]; then pip install torch; \
    else pip install --no-deps --extra-index-url "$TORCH_INDEX" torch; fi

COPY pyproject.toml README.md LICENSE ./
COPY distill_llm ./distill_llm
COPY recipes ./recipes
COPY data ./data
# hadolint ignore=DL3013
RUN pip install '.[tensorboard]'

# Any user may write the caches, so that `--user` works.
RUN useradd --create-home --uid 1000 distill \
    && mkdir -p /work/.cache \
    && chown -R distill /work \
    && chmod -R 1777 /work
VOLUME /work/.cache
ENV HF_HOME=/work/.cache/huggingface \
    PYTHONUNBUFFERED=1
USER 1000
WORKDIR /work

ENTRYPOINT ["distill-llm"]
CMD ["quickstart"]
