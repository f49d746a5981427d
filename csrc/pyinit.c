/* `import fused_lm._C`: loading it registers the kernels; this answers what Python asks. */
#include <Python.h>

int fused_lm_driver_version(void);

static PyObject* driver_version(PyObject* module, PyObject* nothing) {
  (void)module;
  (void)nothing;
  return PyLong_FromLong(fused_lm_driver_version());
}

static PyMethodDef methods[] = {
    {"driver_version", driver_version, METH_NOARGS, "CUDA version of the driver, like 13000; or 0"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "_C", "fused_lm's CUDA kernels", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__C(void) {
  PyObject* module = PyModule_Create(&module_definition);
  if (module != NULL &&
      PyModule_AddStringConstant(module, "schema_hash", FUSED_LM_SCHEMA_HASH) != 0) {
    Py_DECREF(module);
    return NULL;
  }
  return module;
}
